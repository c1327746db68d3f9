"""A guard that keeps a run alive: it skips updates that are not finite and traces them to a layer."""

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from classification.models.spatialmamba import Block, Downsample, Stem

logger = logging.getLogger("spatialmamba")


class NonFiniteError(RuntimeError):
    """Updates stay NaN or infinite, or a validation loss or all losses of an epoch are."""


class NonFiniteGuard:
    """Marks updates whose gradients are not finite for skipping, and counts them, without waiting for the device.

    The forward pass of such an update spoils batch norm's running statistics; the guard restores them. The sums of the
    outputs of stem, blocks and downsamplings tell which module was the first with an output that is not finite.

    Args:
        model: not wrapped; all processes must get the same gradients.
        limit: this number of such updates in a row is an error.
        probe: whether to take the sums; a model that will be compiled cannot take them. Without the sums, only a
            repeated forward pass tells where the values began not to be finite.
    """

    def __init__(self, model: nn.Module, limit: int, probe: bool = True):
        self.model = model
        self.limit = limit
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.kept = [b.clone() for b in self.buffers]
        probed = {n: m for n, m in model.named_modules() if probe and isinstance(m, Stem | Block | Downsample)}
        self.names = list(probed)
        self.sums: dict[int, Tensor] = {}
        for i, module in enumerate(probed.values()):
            module.register_forward_hook(partial(self._probe, i))
        device = next(model.parameters()).device
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # bad updates in a row, and in all
        self.spoilt = torch.zeros(len(self.names), dtype=torch.int32, device=device)
        self.reported = 0

    def _probe(self, index: int, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if module.training:
            total = output.detach().sum(dtype=torch.float32)
            self.sums[index] = self.sums[index] + total if index in self.sums else total

    def snapshot(self) -> None:
        """Keep the running statistics; call this before the first batch of an update."""
        self.sums.clear()
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def flag(self, norm: Tensor) -> Tensor:
        """Count the update. If its gradients are not finite, restore the running statistics.

        Call this after the last batch of an update.

        Args:
            norm: the norm of the gradients.

        Returns:
            1 if the update must be skipped, else 0, in float32.
        """
        bad = ~norm.isfinite()
        self.counts += bad
        self.counts[0] *= bad
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            buffer.copy_(torch.where(bad, kept, buffer))
        for index, total in self.sums.items():
            self.spoilt[index] += ~total.isfinite() & bad
        return bad.float()

    def skipped_in_a_row(self) -> int:
        """Wait for the device and return how many of the last updates were skipped one after the other."""
        return int(self.counts[0])

    def report(self, where: str, forward: Callable[[], object] | None = None) -> bool:
        """Wait for the device and log the updates skipped since the last report. Return whether there were any.

        Args:
            where: place in the run, for the message.
            forward: repeats the last batch's forward pass, to find the layer within the block.

        Raises:
            NonFiniteError: `limit` updates in a row were skipped.
        """
        in_a_row, total = self.counts.tolist()
        if total == self.reported:
            return False
        origin = self._origin(forward)
        message = (
            f"{where}: gradients are not finite, so {total - self.reported} update(s) were skipped, {in_a_row} in a "
            f"row and {total} in all; {origin}"
        )
        self.reported = total
        self.spoilt.zero_()
        if in_a_row >= self.limit:
            raise NonFiniteError(
                f"{message}. TRAIN.MAX_SKIPPED allows fewer than {self.limit} in a row. Lower TRAIN.BASE_LR, or "
                "set TRAIN.AMP bfloat16 or off, and go on from a checkpoint that was saved before them (--resume)"
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning("%s", message)
        return True

    def _origin(self, forward: Callable[[], object] | None) -> str:
        if dist.is_initialized():
            dist.all_reduce(self.spoilt)
        layer = first_non_finite(self.model, forward) if forward else None  # in all processes, for SyncBatchNorm
        parameters = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
        if parameters:
            return f"parameter {parameters[0]} ({len(parameters)} in all) is not finite itself"
        spoilt = [name for name, count in zip(self.names, self.spoilt.tolist(), strict=True) if count]
        if layer and (not spoilt or layer.startswith(spoilt[0])):  # otherwise another process was first
            return f"the first output that is not finite is that of {layer}"
        if spoilt:
            return f"the first output that is not finite is that of {spoilt[0]}"
        gradients = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        if gradients:
            return f"outputs are finite, the gradient of {gradients[-1]} ({len(gradients)} in all) is not"
        return "where it began cannot be told any more"


@torch.no_grad()
def first_non_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Return the name of the first module in `forward()` whose output is not finite although its inputs are, or None.

    Afterwards, the model's buffers, such as running statistics, are as before.
    """
    found: list[str] = []
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, inputs: tuple, output: object) -> None:
        if not found and not _is_finite(output) and all(map(_is_finite, inputs)):
            found.append(names[module] or type(module).__name__)

    hooks = [module.register_forward_hook(look) for module in names]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return found[0] if found else None


def _is_finite(value: object) -> bool:
    return not isinstance(value, Tensor) or bool(value.isfinite().all())
