"""One epoch of training, and an exact evaluation; both take objects and return metrics."""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from classification.compiling import begin_step, filled, is_compiled, uncompiled
from classification.data import UnreadableImages
from classification.errors import UserError
from classification.guards import NonFiniteError, NonFiniteGuard
from classification.seeding import set_seed

logger = logging.getLogger("spatialmamba")

MIB = 2**20


@dataclass
class EpochProgress:
    """How far an epoch has come."""

    step: int = 0  # batches done
    loss: float = 0.0  # sum over the batches whose loss is finite
    finite: int = 0  # number of these batches
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        return self.loss / self.finite if self.finite else math.nan


def _ignore(*_: object) -> None:
    pass


@dataclass
class TrainContext:
    """The objects and settings that one epoch of training works with."""

    model: nn.Module  # wrapped in DistributedDataParallel if there are several processes
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer  # fused, so that it can skip an update without waiting for the device
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    device: torch.device
    autocast: Callable[[], torch.autocast]
    guard: NonFiniteGuard
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    clip_grad: float = 0.0  # largest 2-norm of the gradients; 0: off
    accumulation_steps: int = 1
    seed: int = 0
    rank: int = 0
    unreadable: UnreadableImages = field(default_factory=UnreadableImages)
    # `Training` sets these before an epoch.
    mesa_weight: float = 0.0  # weight of the self-distillation from `ema`
    after_update: Callable[[int, Callable[[], None]], None] = _ignore  # gets updates so far and `_Sums.measure`
    on_report: Callable[[dict[str, float]], None] = _ignore  # called with the measured values

    def __post_init__(self) -> None:
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(f"the optimizer must be made with fused=True, got {type(self.optimizer).__name__}")

    def updates_for(self, batches: int) -> int:
        return -(-batches // self.accumulation_steps)


class _Sums:
    """Sums over the batches of an epoch, kept on the device, and times. `measure` brings `progress` up to date."""

    def __init__(self, progress: EpochProgress, device: torch.device):
        self.progress, self.step = progress, progress.step
        self.loss = torch.tensor(progress.loss, dtype=torch.float64, device=device)
        self.finite = torch.tensor(progress.finite, device=device)
        self.reported = time.perf_counter()
        self.began = self.reported - progress.seconds
        self.images = 0  # since the last report

    def add(self, loss: Tensor, images: int) -> None:
        finite = loss.isfinite()
        self.loss += torch.where(finite, loss, 0)
        self.finite += finite
        self.step += 1
        self.images += images

    def measure(self) -> None:
        p = self.progress
        p.step, p.loss, p.finite = self.step, self.loss.item(), int(self.finite.item())
        p.seconds = time.perf_counter() - self.began

    def images_per_second(self) -> float:
        now = time.perf_counter()
        rate = self.images / (now - self.reported)
        self.images, self.reported = 0, now
        return rate


def train_one_epoch(
    t: TrainContext, loader: DataLoader, epoch: int, print_freq: int = 10, progress: EpochProgress | None = None
) -> dict[str, float]:
    """Train on every batch of `loader`, with one update for every `accumulation_steps` batches and for the rest.

    Args:
        loader: the epoch's batches, or the batches that remain after `progress`.
        progress: where an interrupted epoch goes on, always between two updates. At the end it says where the epoch
            ended.

    Returns:
        `loss`: mean over this process' batches; `lr`: the schedule's rate after the last update, which the next update
        uses; `skipped`: updates that were not finite, since the run was started or resumed; `seconds`.

    Raises:
        NonFiniteError: too many updates in a row were not finite, or no loss of the epoch was. On a GPU, updates are
            checked only when the loss is printed, so that other steps do not wait for the GPU.
        UserError: more images than allowed could not be read.
    """
    progress = progress or EpochProgress()
    start = progress.step
    t.model.train()
    batches = start + len(loader)
    sums = _Sums(progress, t.device)
    norm = torch.zeros((), device=t.device)
    updates_done = epoch * t.updates_for(batches) + start // t.accumulation_steps
    on_cpu = t.device.type == "cpu"
    report_due = False
    bar = _progress_bar(loader, f"epoch {epoch}")
    for step, (images, targets, *unreadable) in enumerate(bar, start):
        for messages in unreadable:
            t.unreadable.add(messages)
        group_start = step - step % t.accumulation_steps
        group_size = min(t.accumulation_steps, batches - group_start)
        ends_group = step + 1 == group_start + group_size
        if step == group_start:
            t.guard.snapshot()
        set_seed(t.seed, epoch, step, t.rank)
        images, targets = _prepare(t, images, targets)
        loss = _forward_backward(t, images, targets, group_size, sync=ends_group)
        sums.add(loss, len(images))
        reports = (step + 1) % print_freq == 0 or step + 1 == batches
        report_due |= reports or on_cpu  # reading a GPU's result stalls it
        if ends_group:
            norm = _update(t)
            if report_due:
                t.guard.report(
                    f"epoch {epoch}, step {step + 1}", lambda x=images, s=step: _repeat_forward(t, x, epoch, s)
                )
                report_due = False
            t.optimizer.zero_grad()
            t.scheduler.step_update(updates_done)  # the index of the update just made, as in the authors' code
            updates_done += 1
        if reports:
            _report(t, bar, sums, norm, epoch, step + 1, batches, updates_done)
        if ends_group:
            t.after_update(updates_done, sums.measure)
    sums.measure()
    if progress.step and not progress.finite:
        raise NonFiniteError(
            f"no loss of epoch {epoch} was finite, so nothing was learnt; the last checkpoint is from before it. Lower "
            "TRAIN.BASE_LR, or set TRAIN.AMP bfloat16 or off, and look at the weights that the run starts from"
        )
    return {
        "loss": progress.mean_loss,
        "lr": t.optimizer.param_groups[0]["lr"],
        "skipped": int(t.guard.counts[1]),
        "seconds": progress.seconds,
    }


def _prepare(t: TrainContext, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Move a batch to the device and apply mixup there."""
    images = images.to(t.device, non_blocking=True)
    targets = targets.to(t.device, non_blocking=True)
    return t.mixup(images, targets) if t.mixup is not None else (images, targets)


def _forward_backward(t: TrainContext, images: Tensor, targets: Tensor, group_size: int, sync: bool) -> Tensor:
    """Add one batch's gradients, divided by `group_size`. Return the loss. Exchange gradients only if `sync`."""
    wait = not sync and isinstance(t.model, DistributedDataParallel)
    begin_step(_unwrap(t.model))
    with t.model.no_sync() if wait else nullcontext():
        with t.autocast():
            logits = t.model(images)
            loss = t.criterion(logits, targets)
            if t.mesa_weight:
                loss = loss + t.mesa_weight * _self_distillation(t.ema, images, logits)
        t.scaler.scale(loss / group_size).backward()
    return loss.detach()


def _repeat_forward(t: TrainContext, images: Tensor, epoch: int, step: int) -> None:
    set_seed(t.seed, epoch, step, t.rank)
    model = _unwrap(t.model)
    with t.autocast(), uncompiled(model):
        model(images)


def _self_distillation(ema: ModelEmaV3, images: Tensor, logits: Tensor) -> Tensor:
    """Return MESA's loss: cross entropy of the logits with the EMA model's softmax, which gets no gradient."""
    with torch.no_grad():
        teacher = ema.module(images).softmax(-1)
    return SoftTargetCrossEntropy()(logits, teacher)


def _update(t: TrainContext) -> Tensor:
    """Clip the gradients and step, unless the gradients are not finite; update the EMA in both cases.

    Returns:
        The norm of the gradients before clipping.
    """
    t.scaler.unscale_(t.optimizer)
    parameters = list(t.model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    bad = t.guard.flag(norm)
    if t.clip_grad:
        # If the norm is not finite, clip by a factor of about 1: the guard must see which gradients are finite.
        nn.utils.clip_grads_with_norm_(parameters, t.clip_grad, torch.where(bad > 0, t.clip_grad, norm))
    # A fused optimizer skips its step if `found_inf` is 1. GradScaler.step sets it by the gradients. Here, their norm
    # decides, which can be infinite although each gradient is finite.
    t.optimizer.grad_scale, t.optimizer.found_inf = None, bad
    t.optimizer.step()
    t.scaler.update()
    if t.ema is not None:
        t.ema.update(_unwrap(t.model))
    return norm


def _report(
    t: TrainContext, bar: Iterable, sums: _Sums, norm: Tensor, epoch: int, step: int, batches: int, update: int
) -> None:
    sums.measure()
    loss, lr, rate = sums.progress.mean_loss, t.optimizer.param_groups[0]["lr"], sums.images_per_second()
    memory = _peak_memory(t.device) / MIB
    measured = {"loss": loss, "lr": lr, "grad_norm": norm.item(), "images_per_second": rate, "memory_mib": memory}
    measured = {key: value for key, value in measured.items() if math.isfinite(value)}
    logger.debug(
        "epoch %d step %d/%d loss %s lr %.3e grad norm %s, %.1f images/s, %.0f MiB",
        epoch, step, batches, _digits(loss, 4), lr, _digits(norm.item(), 3), rate, memory,
    )  # fmt: skip
    t.on_report(
        {
            "epoch": epoch,
            "step": step,
            "steps": batches,
            "update": update,
            **measured,
            "skipped": int(t.guard.counts[1]),
        }
    )
    if isinstance(bar, tqdm):
        bar.set_postfix(loss=_digits(loss, 4), lr=f"{lr:.2e}")


def _digits(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: PyTorch's allocations on a GPU, else the memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in getrusage's unit
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    autocast: Callable[[], torch.autocast],
    before_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in per cent and mean cross entropy; each image of all processes counts once.

    Processes may hold different numbers of images, even none, because they exchange only sums. An image with a negative
    target could not be read and counts separately, as `unreadable`.

    Args:
        before_batch: called before each batch, in all processes equally often.

    Raises:
        UserError: no image could be read.
    """
    model = _unwrap(model)
    was_training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # images, top-1, top-5, loss, unreadable
    batches = iter(_progress_bar(loader, "evaluate"))
    largest_batch = 0  # so far
    rounds = torch.tensor(len(loader), device=device)
    if dist.is_initialized():
        dist.all_reduce(rounds, dist.ReduceOp.MAX)
    for _ in range(int(rounds)):
        if before_batch is not None:
            before_batch()
        batch = next(batches, None)
        if batch is not None:
            largest_batch = max(largest_batch, len(batch[0]))
            sums += _evaluate_batch(model, batch, device, autocast, largest_batch if is_compiled(model) else 0)
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    images, top1, top5, loss, unreadable = sums.tolist()
    if not images:
        raise UserError(f"none of the {int(unreadable)} validation images could be read")
    return {
        "images": int(images),
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        **({"unreadable": int(unreadable)} if unreadable else {}),
    }


def _evaluate_batch(
    model: nn.Module, batch: tuple, device: torch.device, autocast: Callable[[], torch.autocast], fill_to: int
) -> Tensor:
    """Return the batch's sums: images, top-1, top-5, loss, unreadable images. The model gets `fill_to` images."""
    images, targets, *unreadable = batch
    for message in (m for messages in unreadable for m in messages):
        logger.warning("%s; it is not counted", message)
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    with autocast():
        logits = model(filled(images, fill_to))[: len(images)]  # do not keep them: the next batch may overwrite them
    read = targets >= 0
    ranked = (logits.topk(min(5, logits.shape[1])).indices == targets[:, None]) & read[:, None]
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=-1)
    return torch.stack([read.sum(), ranked[:, 0].sum(), ranked.sum(), losses, (~read).sum()])


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _progress_bar(loader: DataLoader, description: str) -> Iterable:
    """Return a progress bar on the first process' terminal; otherwise the plain loader."""
    if not sys.stderr.isatty() or (dist.is_initialized() and dist.get_rank()):
        return loader
    return tqdm(loader, description, leave=False, dynamic_ncols=True)
