"""One epoch of training, and an exact evaluation: objects in, metrics out."""

import logging
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

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

logger = logging.getLogger("spatialmamba")


@dataclass
class Trainer:
    """What one epoch of training works on."""

    model: nn.Module  # wrapped in DistributedDataParallel if there are several processes
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    device: torch.device
    autocast: Callable[[], torch.autocast]
    mixup: Mixup | None = None
    ema: ModelEmaV3 | None = None
    mesa_weight: float = 0.0  # of the self-distillation from `ema`
    clip_grad: float = 0.0  # 2-norm; 0 is off
    accumulation_steps: int = 1

    def updates_per_epoch(self, batches: int) -> int:
        return -(-batches // self.accumulation_steps)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


def train_one_epoch(t: Trainer, loader: DataLoader, epoch: int, print_freq: int = 10) -> dict[str, float]:
    """Train on every batch of `loader`; an update for every `accumulation_steps` batches and for those left over.

    Returns:
        `loss`: mean over this process' batches; `lr`: of the last update; `seconds`.

    Raises:
        NonFiniteLossError: looked for where the loss is printed, so that no step waits for the device.
    """
    t.model.train()
    batches = len(loader)
    total = torch.zeros((), device=t.device)
    start = time.perf_counter()
    bar = _progress(loader, f"epoch {epoch}")
    for step, (images, targets) in enumerate(bar):
        first = step - step % t.accumulation_steps
        group = min(t.accumulation_steps, batches - first)
        last_of_group = step + 1 == first + group
        total += _accumulate(t, images, targets, group, sync=last_of_group)
        if last_of_group:
            _update(t)
            t.scheduler.step_update(epoch * t.updates_per_epoch(batches) + step // t.accumulation_steps + 1)
        if (step + 1) % print_freq == 0 or step + 1 == batches:
            _report(t, bar, total.item() / (step + 1), epoch, step + 1, batches)
    return {
        "loss": total.item() / batches,
        "lr": t.optimizer.param_groups[0]["lr"],
        "seconds": time.perf_counter() - start,
    }


def _accumulate(t: Trainer, images: Tensor, targets: Tensor, group: int, sync: bool) -> Tensor:
    """Add one batch's gradients, divided by `group`; processes exchange them only if `sync`. Returns the loss."""
    images = images.to(t.device, non_blocking=True)
    targets = targets.to(t.device, non_blocking=True)
    if t.mixup is not None:
        images, targets = t.mixup(images, targets)
    wait = not sync and isinstance(t.model, DistributedDataParallel)
    with t.model.no_sync() if wait else nullcontext():
        with t.autocast():
            logits = t.model(images)
            loss = t.criterion(logits, targets)
            if t.mesa_weight:
                loss = loss + t.mesa_weight * _self_distillation(t.ema, images, logits)
        t.scaler.scale(loss / group).backward()
    return loss.detach()


def _self_distillation(ema: ModelEmaV3, images: Tensor, logits: Tensor) -> Tensor:
    """MESA: cross entropy of the logits with the EMA model's softmax, without gradient through the latter."""
    with torch.no_grad():
        teacher = ema.module(images).softmax(-1)
    return SoftTargetCrossEntropy()(logits, teacher)


def _update(t: Trainer) -> None:
    if t.clip_grad:
        t.scaler.unscale_(t.optimizer)
        nn.utils.clip_grad_norm_(t.model.parameters(), t.clip_grad)
    t.scaler.step(t.optimizer)
    t.scaler.update()
    t.optimizer.zero_grad()
    if t.ema is not None:
        t.ema.update(_unwrap(t.model))


def _report(t: Trainer, bar: Iterable, loss: float, epoch: int, step: int, batches: int) -> None:
    if not torch.isfinite(torch.tensor(loss)):
        raise NonFiniteLossError(
            f"the loss became {loss} in epoch {epoch} before step {step}; the last checkpoint is from before it. "
            "Lower TRAIN.BASE_LR, or set TRAIN.AMP bfloat16 or off, and pass another --tag to start anew"
        )
    lr = t.optimizer.param_groups[0]["lr"]
    logger.debug("epoch %d step %d/%d loss %.4f lr %.3e", epoch, step, batches, loss, lr)
    if isinstance(bar, tqdm):
        bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}")


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, device: torch.device, autocast: Callable[[], torch.autocast]
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in per cent and mean cross entropy over the images of all processes, each counted once.

    Processes may hold shares of different size, even none: only sums are exchanged.
    """
    model = _unwrap(model)
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
    for images, targets in _progress(loader, "evaluate"):
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with autocast():
            logits = model(images)
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        sums += torch.stack([torch.tensor(len(targets), device=device), ranked[:, 0].sum(), ranked.sum(), loss])
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    images, top1, top5, loss = sums.tolist()
    return {"images": int(images), "top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images}


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _progress(loader: DataLoader, description: str) -> Iterable:
    """A progress bar on the first process' terminal; in a log, the plain loader."""
    if not sys.stderr.isatty() or (dist.is_initialized() and dist.get_rank()):
        return loader
    return tqdm(loader, description, leave=False, dynamic_ncols=True)
