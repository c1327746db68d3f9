"""What makes a CPU fast: modules that compute the same by other kernels, swapped in and out by one call each.

    model = optimise_for_cpu(spatialmamba_tiny())

The faster of MKL and oneDNN multiplies in linear layers and 1x1 convolutions (`linear.py`). This repository's kernel
runs depthwise 3x3 convolutions. The C library keeps the memory that PyTorch frees (`classification/memory.py`).
"""

import torch
import torch.nn.functional as F
from dwconv2d import dilated_dwconv2d
from torch import Tensor, nn

from classification.memory import keep_freed_memory
from classification.models.linear import MKL_LEADS, dilation, is_product, linear
from classification.models.spatialmamba import StructureAwareSSM, to_planes, to_tokens


class CpuLinear(nn.Linear):
    """`nn.Linear`, applied by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class CpuPointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution by the library that `linear` takes; planes (B, C, H, W) keep their layout."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels or not is_product(x, self.weight, self.bias):
            return super().forward(x)
        if not MKL_LEADS and not torch.compiler.is_dynamo_compiling():
            return F.conv2d(x, self.weight, self.bias, dilation=dilation())
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return to_planes(linear(to_tokens(x), self.weight.flatten(1), self.bias))


class CpuDepthwiseConv2d(nn.Conv2d):
    """A depthwise 3x3 convolution by `dwconv2d.dilated_dwconv2d`; planes (B, C, H, W) keep their layout."""

    def forward(self, x: Tensor) -> Tensor:
        plain = type(self.weight) is nn.Parameter and x.dim() == 4 and x.device.type == "cpu"
        if not plain or x.shape[1] != self.in_channels:
            return super().forward(x)
        return dilated_dwconv2d(x, self.weight, self.bias, padding_mode="zeros")


class CpuStructureAwareSSM(StructureAwareSSM):
    """`StructureAwareSSM`, whose projections are applied to tokens by `linear`, if planes are laid out as these."""

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.stride(-1) == 1:
            return super().project(x, weight)
        return to_planes(linear(to_tokens(x), weight))


_SWAPPED = (CpuLinear, CpuPointwiseConv2d, CpuDepthwiseConv2d, CpuStructureAwareSSM)


def optimise_for_cpu(model: nn.Module) -> nn.Module:
    """Change the classes of `model`'s modules, in place, to those above; returns `model`.

    Parameters, names, hooks and modes stay, and so do values, to rounding. It works in training and evaluation, on a
    whole detector too. Only modules that are exactly PyTorch's or `StructureAwareSSM` are changed: adapters and
    quantised layers are left alone. On other devices the modules do what they did before. The process keeps freed
    memory from then on, see `keep_freed_memory`.
    """
    keep_freed_memory()
    for module in model.modules():
        if (swapped := _class_for(module)) is not None:
            module.__class__ = swapped
    return model


def undo_optimise_for_cpu(model: nn.Module) -> nn.Module:
    """Give the modules that `optimise_for_cpu` has changed their own classes back, in place; returns `model`."""
    for module in model.modules():
        if type(module) in _SWAPPED:
            module.__class__ = type(module).__base__
    return model


def _class_for(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Linear:
        return CpuLinear
    if type(module) is StructureAwareSSM:
        return CpuStructureAwareSSM
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or module.stride != (1, 1):
        return None
    depthwise = module.groups == module.in_channels == module.out_channels
    if module.kernel_size == (1, 1) and module.groups == 1 and module.padding in ((0, 0), "valid", "same"):
        return CpuPointwiseConv2d
    if module.kernel_size == (3, 3) and depthwise and module.dilation == (1, 1) and module.padding in ((1, 1), "same"):
        return CpuDepthwiseConv2d
    return None
