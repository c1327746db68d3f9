"""Batch norm over the batches of all processes, on the devices for which PyTorch has none."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` in plain PyTorch, for images (B, C, H, W); processes may hold batches of different sizes.

    In training, mean and variance are those of all processes' values together, so each of them gets the output, the
    gradients and the running statistics that one process with the whole batch would. Statistics are float32 at least.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
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
