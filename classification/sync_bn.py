"""Batch norm on several processes: synchronised in plain PyTorch, or each process alone with averaged statistics."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` in plain PyTorch, for images (B, C, H, W); processes may hold batches of different sizes.

    In training, mean and variance are over the values of all processes together. So each process gets the output, the
    gradients and the running statistics that one process with the whole batch would get. Statistics have at least
    float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        return self._synchronised(x)

    # Dynamo loses the backward pass of `all_reduce`, so that the gradients through the statistics would be wrong.
    @torch.compiler.disable
    def _synchronised(self, x: Tensor) -> Tensor:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        channels = (1, -1, 1, 1)
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = all_reduce(torch.cat([values.sum((0, 2, 3)), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = values - mean.view(channels)
        var = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(channels) + self.bias.view(channels)).to(x.dtype)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Synchronise the batch norms of a model in place; parameters, buffers and their names stay as they are."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of a model's batch norms by name, as the buffers themselves."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith((".running_mean", ".running_var"))}


def average_batch_norm(model: nn.Module) -> None:
    """Set the batch norms of all processes to the mean of their running statistics, in place.

    The sum is in float64, so that averaging equal statistics leaves every bit as it is: a run that is interrupted
    between averaging and its checkpoint averages twice.
    """
    for buffer in running_statistics(model).values():
        total = buffer.double()
        dist.all_reduce(total)
        buffer.copy_(total / dist.get_world_size())


def mean_statistics(of_each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of the running statistics of several processes by name, computed as in `average_batch_norm`."""
    return {
        name: (sum(statistics[name].double() for statistics in of_each) / len(of_each)).to(first.dtype)
        for name, first in of_each[0].items()
    }
