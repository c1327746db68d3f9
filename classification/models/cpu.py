"""Modules that compute the same by kernels that are faster on a CPU. One call swaps them in, another one out.

    model = optimise_for_cpu(spatialmamba_tiny())

Linear layers and 1x1 convolutions use MKL or oneDNN, whichever is faster (`linear.py`). This repository's kernel
runs depthwise 3x3 convolutions. The C library keeps the memory that PyTorch frees (`classification/memory.py`).
"""

import torch
import torch.nn.functional as F
from dwconv2d import dilated_dwconv2d
from torch import Tensor, nn
from torch.autograd import forward_ad

from classification.memory import keep_freed_memory
from classification.models.linear import MKL_LEADS, dilation, is_product, linear
from classification.models.spatialmamba import StructureAwareSSM, to_planes, to_tokens


class CpuLinear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class CpuPointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution by the same library as `linear`. Planes (B, C, H, W) keep their layout."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels or not is_product(x, self.weight, self.bias):
            return super().forward(x)
        if not MKL_LEADS and not torch.compiler.is_dynamo_compiling():
            return F.conv2d(x, self.weight, self.bias, dilation=dilation())
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return to_planes(linear(to_tokens(x), self.weight.flatten(1), self.bias))


class CpuStridedConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 2. If the image is wide, it computes the gradient of its weight in strips of columns.

    oneDNN (PyTorch 2.11, AVX-512) has a fast kernel for this gradient if the result has up to 750 columns. With 896 and
    more, it takes its reference kernel, which needs many minutes for an image of 4096x4096 pixels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[3] <= 2 * STRIP or not self._is_trained(x):
            return super().forward(x)
        return _StridedConvolution.apply(x, self.weight, self.bias)

    def _is_trained(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        trained = torch.is_grad_enabled() and self.weight.requires_grad and forward_ad._current_level < 0
        return trained and is_product(x, self.weight, self.bias)


class _StridedConvolution(torch.autograd.Function):
    """F.conv2d(x, weight, bias, stride=2, padding=1) for 3x3 kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, stride=2, padding=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _convolution_backward(grad, x, weight, 1, [True, False, False])[0] if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight)
        for first in range(0, grad.shape[3], STRIP):
            columns = grad[..., first : first + STRIP]
            # Column j of the result reads columns 2 j - 1 to 2 j + 1 of x.
            left, right = 2 * first - 1, 2 * (first + columns.shape[3])
            strip = F.pad(x[..., max(left, 0) : right], (int(left < 0), max(right - x.shape[3], 0)))
            grad_weight += _convolution_backward(columns, strip, weight, 0, [False, True, False])[1]
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding_of_columns: int, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    geometry = ([2, 2], [1, padding_of_columns], [1, 1], False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(grad, x, weight, weight.shape[:1], *geometry, wanted)


class CpuDepthwiseConv2d(nn.Conv2d):
    """A depthwise 3x3 convolution by `dwconv2d.dilated_dwconv2d`. Planes (B, C, H, W) keep their layout."""

    def forward(self, x: Tensor) -> Tensor:
        plain = type(self.weight) is nn.Parameter and x.dim() == 4 and x.device.type == "cpu"
        if not plain or x.shape[1] != self.in_channels:
            return super().forward(x)
        return dilated_dwconv2d(x, self.weight, self.bias, padding_mode="zeros")


class CpuStructureAwareSSM(StructureAwareSSM):
    """`StructureAwareSSM` that projects by `linear` if its planes have the memory layout of tokens."""

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.stride(-1) == 1:
            return super().project(x, weight)
        return to_planes(linear(to_tokens(x), weight))


STRIP = 512  # columns of a result
_SWAPPED = (CpuLinear, CpuPointwiseConv2d, CpuStridedConv2d, CpuDepthwiseConv2d, CpuStructureAwareSSM)


def optimise_for_cpu(model: nn.Module) -> nn.Module:
    """Change the classes of `model`'s modules in place to the classes above. Return `model`.

    Parameters, names, hooks and modes stay the same. Results differ by rounding alone. The modules work in training and
    in evaluation, also inside a whole detector. On other devices, they do what they did before. Only modules change
    whose class is exactly PyTorch's or `StructureAwareSSM`: adapters and quantised layers stay. The process keeps freed
    memory from then on, see `keep_freed_memory`.
    """
    keep_freed_memory()
    for module in model.modules():
        if (swapped := _class_for(module)) is not None:
            module.__class__ = swapped
    return model


def undo_optimise_for_cpu(model: nn.Module) -> nn.Module:
    """Restore in place the classes that `optimise_for_cpu` changed. Return `model`."""
    for module in model.modules():
        if type(module) in _SWAPPED:
            module.__class__ = type(module).__base__
    return model


def _class_for(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Linear:
        return CpuLinear
    if type(module) is StructureAwareSSM:
        return CpuStructureAwareSSM
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
        return None
    if module.stride != (1, 1):
        strided = (module.kernel_size, module.stride, module.padding) == ((3, 3), (2, 2), (1, 1))
        return CpuStridedConv2d if strided and module.groups == 1 and module.dilation == (1, 1) else None
    depthwise = module.groups == module.in_channels == module.out_channels
    if module.kernel_size == (1, 1) and module.groups == 1 and module.padding in ((0, 0), "valid", "same"):
        return CpuPointwiseConv2d
    if module.kernel_size == (3, 3) and depthwise and module.dilation == (1, 1) and module.padding in ((1, 1), "same"):
        return CpuDepthwiseConv2d
    return None
