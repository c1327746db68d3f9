"""Modules that compute the same by kernels that are faster on a CPU. One call swaps them in, another one out.

    model = optimise_for_cpu(spatialmamba_tiny())
    model = optimise_for_cpu(spatialmamba_tiny().eval(), hold_weights=True)  # for inference

Linear layers and 1x1 convolutions use MKL or oneDNN, whichever is faster (`linear.py`). This repository's kernel
runs depthwise 3x3 convolutions. The C library keeps the memory that PyTorch frees (`classification/memory.py`).
"""

import torch
import torch.nn.functional as F
from dwconv2d import dilated_dwconv2d
from torch import Tensor, nn
from torch.autograd import forward_ad

from classification.memory import keep_freed_memory
from classification.models.fusing import GLOBAL_HOOKS, has_hooks
from classification.models.held import Holding, depthwise, folded, held_dtype, pack, pack_depthwise, product, steps
from classification.models.linear import MKL_LEADS, dilation, is_product, linear
from classification.models.spatialmamba import ConvLayer, Mlp, StructureAwareSSM, to_planes, to_tokens


class CpuLinear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class CpuPointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution by the same library as `linear`. Planes (B, C, H, W) keep their layout."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels or not is_product(x, self.weight, self.bias):
            return super().forward(x)
        if class_by_geometry(self) is not CpuPointwiseConv2d:
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
        if class_by_geometry(self) is not CpuStridedConv2d:
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
        if not plain or x.shape[1] != self.in_channels or class_by_geometry(self) is not CpuDepthwiseConv2d:
            return super().forward(x)
        return dilated_dwconv2d(x, self.weight, self.bias, padding_mode="zeros")


class CpuStructureAwareSSM(StructureAwareSSM):
    """`StructureAwareSSM` that projects by `linear` if its planes have the memory layout of tokens."""

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.stride(-1) == 1:
            return super().project(x, weight)
        return to_planes(linear(to_tokens(x), weight))


STRIP = 512  # columns of a result
LARGE = 150_000  # numbers; in smaller planes this repository's depthwise convolution is as fast in bfloat16


# ----- inference by weights that are held packed, see `held.py`


class HeldLinear(Holding, CpuLinear):
    """`CpuLinear` that holds its weight packed for inference."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.held_dtype(x)
        return super().forward(x) if dtype is None else self.product(x, dtype)

    def held_dtype(self, x: Tensor) -> torch.dtype | None:
        fits = x.shape[-1:] == self.weight.shape[1:] and _fits(self.bias, self.weight)
        return held_dtype(x, self.weight, self.bias) if fits else None

    def product(self, x: Tensor, dtype: torch.dtype, then: str = "none") -> Tensor:
        packed = self.held(dtype, lambda: pack(self.weight, self.bias, dtype, x), self.weight, self.bias)
        return product(x.to(dtype), *packed, then)


class HeldMlp(Mlp):
    """`Mlp` by packed weights in inference. Its first product applies GELU."""

    def forward(self, x: Tensor) -> Tensor:
        fc1, act, fc2 = self.fc1, self.act, self.fc2
        known = type(fc1) is HeldLinear and type(act) is nn.GELU and act.approximate == "none"
        if not known or (dtype := fc1.held_dtype(x)) is None or _is_hooked(fc1, act):
            return super().forward(x)
        return fc2(fc1.product(x, dtype, "gelu"))


class HeldConvLayer(Holding, ConvLayer):
    """`ConvLayer` as one convolution and ReLU in inference: batch norm is folded into the weights."""

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        fits = type(conv) in _CONVOLUTIONS and x.dim() == 4 and x.shape[1] == conv.in_channels and self._is_one()
        if not fits or (dtype := held_dtype(x, *(sources := self._sources())[:4])) is None:
            return super().forward(x)
        # Another eps gives other weights.
        packs = class_by_geometry(conv) is CpuPointwiseConv2d and to_tokens(x).is_contiguous()
        name = dtype, getattr(self.norm, "eps", None), packs
        if packs:
            tokens = to_tokens(x).to(dtype)
            y = to_planes(product(tokens, *self.held(name, lambda: self._packed(dtype, tokens), *sources)))
        else:
            weight, bias = self.held(name, lambda: self._folded(dtype), *sources)
            y = F.conv2d(x.to(dtype), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y.relu_() if type(self.act) is nn.ReLU else y

    def _sources(self) -> tuple[Tensor | None, ...]:
        conv, norm = self.conv, self.norm
        of_norm = (norm.weight, norm.bias, norm.running_mean, norm.running_var) if type(norm) is nn.BatchNorm2d else ()
        return (conv.weight, conv.bias, *of_norm)

    def _is_one(self) -> bool:
        conv, norm, act = self.conv, self.norm, self.act
        batch_norm = type(norm) is nn.BatchNorm2d and not norm.training and norm.running_var is not None and norm.affine
        batch_norm = batch_norm and norm.running_mean.is_cpu and norm.running_var.is_cpu
        known = (batch_norm or type(norm) is nn.Identity) and type(act) in (nn.ReLU, nn.Identity)
        return (
            known and conv.padding_mode == "zeros" and _fits(conv.bias, conv.weight) and not _is_hooked(conv, norm, act)
        )

    def _packed(self, dtype: torch.dtype, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = folded(self.conv, self.norm)
        return pack(weight.flatten(1), bias, dtype, tokens)

    def _folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        weight, bias = folded(self.conv, self.norm)
        return weight.to(dtype), None if bias is None else bias.to(dtype)


class HeldDepthwiseConv2d(Holding, CpuDepthwiseConv2d):
    """`CpuDepthwiseConv2d` by oneDNN in bfloat16 inference, for large planes laid out as tokens: it is faster there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if (dtype := self.held_dtype(x)) is None else self.convolution(x, dtype)

    def held_dtype(self, x: Tensor) -> torch.dtype | None:
        fits = x.numel() > LARGE and x.dim() == 4 and x.shape[1] == self.in_channels and x.stride(1) == 1
        fits = fits and _fits(self.bias, self.weight) and class_by_geometry(self) is CpuDepthwiseConv2d
        dtype = held_dtype(x, self.weight, self.bias) if fits else None
        return dtype if dtype == torch.bfloat16 else None

    def convolution(self, x: Tensor, dtype: torch.dtype, then: str = "none") -> Tensor:
        x = x.to(dtype)
        packed = self.held(dtype, lambda: pack_depthwise(self.weight, self.bias, dtype, x), self.weight, self.bias)
        return depthwise(x, *packed, then)


class HeldStructureAwareSSM(Holding, CpuStructureAwareSSM):
    """`CpuStructureAwareSSM` with weights held packed for inference; a product applies the gate's SiLU."""

    def forward(self, u: Tensor) -> Tensor:
        layer = self.in_proj
        known = type(layer) is HeldLinear and layer.bias is None
        if not known or (dtype := layer.held_dtype(u)) is None or _is_hooked(layer):
            return super().forward(u)

        def halves() -> list[Tensor]:
            return [pack(half, None, dtype, u)[0] for half in layer.weight.chunk(2)]

        u, (x, z) = u.to(dtype), self.held(("in_proj", dtype), halves, layer.weight)
        return self.out_proj(self.gate(product(u, x), product(u, z, then="swish")))

    def gate(self, x: Tensor, z: Tensor) -> Tensor:
        conv, planes = self.conv2d, to_planes(x)
        if type(conv) is not HeldDepthwiseConv2d or (dtype := conv.held_dtype(planes)) is None or _is_hooked(conv):
            return super().gate(x, z)
        return self.out_norm(to_tokens(self.ssm(conv.convolution(planes, dtype, "swish")))) * z

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.stride(1) != 1 or (dtype := held_dtype(x, weight)) is None:
            return super().project(x, weight)
        tokens, name = to_tokens(x).to(dtype), "x_proj" if weight is self.x_proj_weight else "dt_proj"
        packed = self.held((name, dtype), lambda: pack(weight, None, dtype, tokens), weight)
        return to_planes(product(tokens, *packed))


def _fits(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether a layer's bias has the shape that PyTorch's own layer checks."""
    return bias is None or bias.shape == weight.shape[:1]


def _is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of the modules does more than its class does, so that it must be called."""
    return any(GLOBAL_HOOKS) or any(map(has_hooks, modules))


_CONVOLUTIONS = (nn.Conv2d, CpuPointwiseConv2d, CpuStridedConv2d, CpuDepthwiseConv2d)
_PLAIN = {
    CpuLinear: nn.Linear,
    HeldLinear: nn.Linear,
    CpuPointwiseConv2d: nn.Conv2d,
    CpuStridedConv2d: nn.Conv2d,
    CpuDepthwiseConv2d: nn.Conv2d,
    HeldDepthwiseConv2d: nn.Conv2d,
    CpuStructureAwareSSM: StructureAwareSSM,
    HeldStructureAwareSSM: StructureAwareSSM,
    HeldConvLayer: ConvLayer,
    HeldMlp: Mlp,
}
_HELD = {
    CpuLinear: HeldLinear,
    CpuDepthwiseConv2d: HeldDepthwiseConv2d,
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
        hold_weights: for inference, hold a copy of the weights that is cast and packed once: in bfloat16 under autocast
            or for a model in bfloat16, and in float32 where oneDNN leads. If a weight changes, its copy is made anew.
            But a change through `.data`, NumPy, or another tensor or process that shares the memory may not be seen
            until `model.eval()` or `model.train()` is called.
    """
    keep_freed_memory()
    if hold_weights:
        steps.count()
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
    return class_by_geometry(module) if type(module) is nn.Conv2d else None


def class_by_geometry(conv: nn.Conv2d) -> type[nn.Conv2d] | None:
    """Return the class above that computes such a convolution. Tools change the geometry of a layer at any time."""
    if conv.padding_mode != "zeros":
        return None
    if conv.stride != (1, 1):
        strided = (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 2), (1, 1))
        return CpuStridedConv2d if strided and conv.groups == 1 and conv.dilation == (1, 1) else None
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same"):
        return CpuPointwiseConv2d
    if conv.kernel_size == (3, 3) and depthwise and conv.dilation == (1, 1) and conv.padding in ((1, 1), "same"):
        return CpuDepthwiseConv2d
    return None
