"""Modules that compute the same by kernels that are faster on a CPU. One call swaps them in, another one out.

    model = optimise_for_cpu(spatialmamba_tiny())
    model = optimise_for_cpu(spatialmamba_tiny().eval(), hold_weights=True)  # for inference in bfloat16

Linear layers and 1x1 convolutions use MKL or oneDNN, whichever is faster (`linear.py`). This repository's kernel
runs depthwise 3x3 convolutions. The C library keeps the memory that PyTorch frees (`classification/memory.py`).
"""

import torch
import torch.nn.functional as F
from dwconv2d import dilated_dwconv2d
from torch import Tensor, nn
from torch.autograd import forward_ad

from classification.memory import keep_freed_memory
from classification.models.held import Holding, folded, holds, pack, product
from classification.models.linear import MKL_LEADS, dilation, is_product, linear
from classification.models.spatialmamba import (
    GLOBAL_HOOKS,
    ConvLayer,
    Mlp,
    StructureAwareSSM,
    has_hooks,
    to_planes,
    to_tokens,
)


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


# ----- inference in bfloat16 by weights that are held packed


class HeldLinear(Holding, CpuLinear):
    """`CpuLinear` that holds its weight packed for inference in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) if self.fits(x) else super().forward(x)

    def fits(self, x: Tensor) -> bool:
        return holds(x, self.weight, self.bias) and x.shape[-1] == self.in_features

    def product(self, x: Tensor, then: str = "none") -> Tensor:
        packed = self.held("weight", lambda: pack(self.weight, self.bias, x), self.weight, self.bias)
        return product(x, *packed, then)


class HeldMlp(Mlp):
    """`Mlp` whose first product applies GELU, in inference in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        fc1, act = self.fc1, self.act
        known = type(fc1) is HeldLinear and type(act) is nn.GELU and act.approximate == "none"
        if known and fc1.fits(x) and not _is_hooked(fc1, act):
            return self.fc2(fc1.product(x, "gelu"))
        return super().forward(x)


class HeldConvLayer(Holding, ConvLayer):
    """`ConvLayer` as one convolution and ReLU in inference in bfloat16: batch norm is folded into the weights."""

    def forward(self, x: Tensor) -> Tensor:
        if not (holds(x) and self._is_one() and self._fits(x)):
            return super().forward(x)
        conv = self.conv
        sources = (conv.weight, conv.bias, *self.norm.parameters(), *self.norm.buffers())
        if type(conv) is CpuPointwiseConv2d and conv.stride == (1, 1):
            tokens = to_tokens(x)
            y = to_planes(product(tokens, *self.held("product", lambda: self._packed(tokens), *sources)))
        else:
            weight, bias = self.held("convolution", self._folded, *sources)
            y = F.conv2d(x.bfloat16(), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y.relu_() if type(self.act) is nn.ReLU else y

    def _fits(self, x: Tensor) -> bool:
        return x.dim() == 4 and x.shape[1] == self.conv.in_channels and holds(x, self.conv.weight, self.conv.bias)

    def _packed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = folded(self.conv, self.norm)
        return pack(weight.flatten(1), bias, tokens)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = folded(self.conv, self.norm)
        return weight.bfloat16(), None if bias is None else bias.bfloat16()

    def _is_one(self) -> bool:
        conv, norm, act = self.conv, self.norm, self.act
        plain = type(conv) is nn.Conv2d or _PLAIN.get(type(conv)) is nn.Conv2d
        batch_norm = type(norm) is nn.BatchNorm2d and not norm.training and norm.running_var is not None and norm.affine
        known = (batch_norm or type(norm) is nn.Identity) and type(act) in (nn.ReLU, nn.Identity)
        return plain and known and conv.padding_mode == "zeros" and not _is_hooked(conv, norm, act)


class HeldStructureAwareSSM(Holding, CpuStructureAwareSSM):
    """`CpuStructureAwareSSM` with weights held packed for inference in bfloat16; a product applies the gate's SiLU."""

    def forward(self, u: Tensor) -> Tensor:
        layer = self.in_proj
        if type(layer) is not HeldLinear or layer.bias is not None or not layer.fits(u) or _is_hooked(layer):
            return super().forward(u)
        x, z = self.held("in_proj", lambda: [pack(half, None, u)[0] for half in layer.weight.chunk(2)], layer.weight)
        return self.out_proj(self.gate(product(u, x), product(u, z, then="swish")))

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.stride(1) != 1 or not holds(x, weight):
            return super().project(x, weight)
        tokens, name = to_tokens(x), "x_proj" if weight is self.x_proj_weight else "dt_proj"
        return to_planes(product(tokens, *self.held(name, lambda: pack(weight, None, tokens), weight)))


def _is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of the modules does more than its class does, so that it must be called."""
    return any(GLOBAL_HOOKS) or any(map(has_hooks, modules))


_PLAIN = {
    CpuLinear: nn.Linear,
    HeldLinear: nn.Linear,
    CpuPointwiseConv2d: nn.Conv2d,
    CpuStridedConv2d: nn.Conv2d,
    CpuDepthwiseConv2d: nn.Conv2d,
    CpuStructureAwareSSM: StructureAwareSSM,
    HeldStructureAwareSSM: StructureAwareSSM,
    HeldConvLayer: ConvLayer,
    HeldMlp: Mlp,
}
_HELD = {
    CpuLinear: HeldLinear,
    CpuStructureAwareSSM: HeldStructureAwareSSM,
    ConvLayer: HeldConvLayer,
    Mlp: HeldMlp,
}


def optimise_for_cpu(model: nn.Module, hold_weights: bool = False) -> nn.Module:
    """Change the classes of `model`'s modules in place to the classes above. Return `model`.

    Parameters, names, hooks and modes stay the same. Results differ by rounding alone. The modules work in training and
    in evaluation, also inside a whole detector. On other devices, they do what they did before. Only modules change
    whose class is exactly PyTorch's or this repository's: adapters and quantised layers stay. The process keeps freed
    memory from then on, see `keep_freed_memory`.

    Args:
        model: the model.
        hold_weights: for inference in bfloat16, under autocast or with a model in bfloat16: hold a copy of the weights
            that is cast and packed once, 2 bytes a weight. If a weight changes, its copy is made anew. But changes
            through `.data` are not seen until `model.eval()` or `model.train()` is called.
    """
    keep_freed_memory()
    for module in model.modules():
        swapped = _class_for(module)
        if hold_weights:
            swapped = _HELD.get(swapped or type(module), swapped)
        if swapped is not None:
            module.__class__ = swapped
    return model


def undo_optimise_for_cpu(model: nn.Module) -> nn.Module:
    """Restore in place the classes that `optimise_for_cpu` changed. Return `model`."""
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__dict__.pop("_held", None)
            module.__class__ = _PLAIN[type(module)]
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
