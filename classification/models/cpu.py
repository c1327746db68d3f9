"""Modules that compute the same by kernels that are faster on a CPU. One call swaps them in, another one out.

    model = optimise_for_cpu(spatialmamba_tiny())
    model = optimise_for_cpu(spatialmamba_tiny().eval(), prepack_weights=True)  # for inference

Linear layers and 1x1 convolutions use MKL or oneDNN, whichever is faster (`linear.py`). This repository's kernel
runs depthwise 3x3 convolutions. The C library keeps the memory that PyTorch frees (`classification/memory.py`).
"""

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from dwconv2d import dilated_dwconv2d
from torch import Tensor, nn
from torch.autograd import forward_ad

from classification.memory import keep_freed_memory
from classification.models.fused_operators import GLOBAL_HOOKS, has_hooks
from classification.models.linear import MKL_LEADS, dilation, is_product, linear
from classification.models.prepacked import Prepacked, depthwise, folded, pack, pack_depthwise, prepacked_dtype, product
from classification.models.spatialmamba import (
    Block,
    ConvLayer,
    DropPath,
    Mlp,
    StateFusion,
    StructureAwareSSM,
    to_planes,
    to_tokens,
)


class CpuLinear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        if nn.Linear.forward is not _LINEAR:
            return super().forward(x)
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
        if torch._C._are_functorch_transforms_active():  # under vmap, a tensor does not tell its layout
            return super().forward(x)
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
            # Not in place: under vmap, as of batched gradients, only the summand is a batch.
            grad_weight = grad_weight + _convolution_backward(columns, strip, weight, 0, [False, True, False])[1]
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
        if x.stride(-1) == 1 or StructureAwareSSM.project is not _PROJECT:
            return super().project(x, weight)
        return to_planes(linear(to_tokens(x), weight))


# Methods as they are at import: others, which somebody puts in their place, are called.
_PROJECT, _LINEAR, _CONV = StructureAwareSSM.project, nn.Linear.forward, nn.Conv2d.forward
_CONV_FORWARD = nn.Conv2d._conv_forward
STRIP = 512  # columns of a result
LARGE = 150_000  # numbers; in smaller planes this repository's depthwise convolution is as fast in bfloat16


# ----- inference with prepacked weights, see `prepacked.py`


class PrepackedLinear(Prepacked, CpuLinear):
    """`CpuLinear` that holds its weight packed for inference."""

    def forward(self, x: Tensor) -> Tensor:
        fits = x.shape[-1:] == self.weight.shape[1:] and _fits(self.bias, self.weight)
        dtype = prepacked_dtype(x, self.weight, self.bias) if fits else None
        if dtype is None:
            return super().forward(x)
        if nn.Linear.forward is not _LINEAR:
            return super().forward(x)
        packed = self.prepacked(dtype, lambda: pack(self.weight, self.bias, dtype, x), self.weight, self.bias)
        return product(x.to(dtype), *packed)


class PrepackedConvLayer(Prepacked, ConvLayer):
    """`ConvLayer` as one convolution and ReLU in inference: batch norm is folded into the weights."""

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        fits = type(conv) in _CONVOLUTIONS and x.dim() == 4 and x.shape[1] == conv.in_channels and self._is_one()
        dtype = prepacked_dtype(x, *(sources := self._sources())[:4]) if fits else None
        if dtype is None or _is_patched():
            return super().forward(x)
        # Another eps gives other weights.
        packs = class_by_geometry(conv) is CpuPointwiseConv2d and to_tokens(x).is_contiguous()
        name = dtype, getattr(self.norm, "eps", None), packs
        if packs:
            tokens = to_tokens(x).to(dtype)
            y = to_planes(product(tokens, *self.prepacked(name, lambda: self._packed(dtype, tokens), *sources)))
        else:
            weight, bias = self.prepacked(name, lambda: self._folded(dtype), *sources)
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


class PrepackedDepthwiseConv2d(Prepacked, CpuDepthwiseConv2d):
    """`CpuDepthwiseConv2d` by oneDNN in bfloat16 inference, for large planes laid out as tokens: it is faster there."""

    def forward(self, x: Tensor) -> Tensor:
        fits = x.dim() == 4 and x.shape[1] == self.in_channels and _is_large(x)
        fits = fits and _fits(self.bias, self.weight) and class_by_geometry(self) is CpuDepthwiseConv2d
        dtype = prepacked_dtype(x, self.weight, self.bias) if fits else None
        if dtype != torch.bfloat16:
            return super().forward(x)
        packed = self.prepacked(dtype, lambda: pack_depthwise(self.weight, self.bias, dtype, x), self.weight, self.bias)
        return depthwise(x.to(dtype), *packed)


class BlockWeights(NamedTuple):
    """What `PrepackedBlock` computes with: arguments of `F.layer_norm`, `product`, `_depthwise` and the operators."""

    cpe1: tuple
    ln_1: tuple
    to_x: Tensor  # the halves of in_proj
    to_z: Tensor
    conv2d: tuple
    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    delta_bias: Tensor
    fusion: tuple[Tensor, ...]  # kernels and alpha
    Ds: Tensor
    out_norm: tuple
    out_proj: tuple
    cpe2: tuple
    ln_2: tuple
    fc1: tuple
    fc2: tuple


class PrepackedBlock(Prepacked, Block):
    """`Block` in inference as one function of prepacked weights. Products apply GELU and the gate's SiLU.

    For small images and batches, calling the block's 15 modules takes as long as what they compute. If one of them has
    a hook, is of another class, or has a method that is not its class' own, all are called.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = prepacked_dtype(x)
        fits = x.dtype == dtype and x.dim() == 4 and x.shape[3:] == getattr(self.ln_1, "normalized_shape", None)
        sources = self._sources() if fits else None
        if sources is None:
            return super().forward(x)
        ssm = self.self_attention
        name = dtype, self.ln_1.eps, self.ln_2.eps, ssm.out_norm.eps  # another eps gives other results
        weights = self.kept(name, sources)
        if weights is None:
            if not self._fits(x) or prepacked_dtype(x, *sources) is None:
                return super().forward(x)
            weights = self.keep(name, lambda: self._packed(x, dtype), sources)
        with torch._C._DisableAutocast():
            return _infer(x, weights, [ssm.dt_rank, ssm.d_state, ssm.d_state])

    def _sources(self) -> list[Tensor] | None:
        """Return the block's parameters; None if calling its layers does not do what `_infer` does, or does more."""
        own = self._modules  # reading a module's attributes takes longer
        ssm, mlp = own["self_attention"], own["mlp"]
        if type(ssm) is not CpuStructureAwareSSM or type(mlp) is not Mlp:
            return None
        if not _METHODS.isdisjoint(self.__dict__) or not _METHODS.isdisjoint(ssm.__dict__):  # to record states
            return None
        of_ssm = (ssm._modules.get(name) for name in ("in_proj", "conv2d", "state_fusion", "out_norm", "out_proj"))
        of_mlp = (mlp._modules.get(name) for name in ("fc1", "act", "fc2"))
        layers = own["cpe1"], own["ln_1"], ssm, *of_ssm, own["drop_path"], own["cpe2"], own["ln_2"], mlp, *of_mlp
        if tuple(map(type, layers)) != _OF_BLOCK or _is_hooked(*layers) or _is_patched():
            return None
        cpe1, _, _, in_proj, conv2d, _, _, _, drop_path, cpe2, _, _, _, act, _ = layers
        by_geometry = all(class_by_geometry(one) is CpuDepthwiseConv2d for one in (cpe1, conv2d, cpe2))
        drops = drop_path.training and drop_path.drop_prob
        if not by_geometry or drops or in_proj.bias is not None or act.approximate != "none":
            return None
        parameters = [one for layer in layers for one in layer._parameters.items()]
        if tuple(name for name, _ in parameters) != _PARAMETERS:  # one is a buffer now, or a plain tensor
            return None
        return [one for _, one in parameters if one is not None]

    def _fits(self, x: Tensor) -> bool:
        """Whether x and the layers have the shapes that the block was made for. If not, a layer says what is wrong."""
        ssm, mlp = self.self_attention, self.mlp
        dim, inner, hidden, rank = x.shape[3], ssm.Ds.numel(), mlp.fc1.out_features, ssm.dt_rank
        shapes = (
            (ssm.in_proj.weight, (2 * inner, dim)),
            (ssm.x_proj_weight, (rank + 2 * ssm.d_state, inner)),
            (ssm.dt_projs_weight, (inner, rank)),
            (ssm.out_proj.weight, (dim, inner)),
            (mlp.fc1.weight, (hidden, dim)),
            (mlp.fc2.weight, (dim, hidden)),
            (self.cpe1.weight, (dim, 1, 3, 3)),
            (ssm.conv2d.weight, (inner, 1, 3, 3)),
            (self.cpe2.weight, (dim, 1, 3, 3)),
        )
        with_bias = (self.cpe1, ssm.conv2d, ssm.out_proj, self.cpe2, mlp.fc1, mlp.fc2)
        return all(t is not None and t.shape == shape for t, shape in shapes) and all(
            _fits(one.bias, one.weight) for one in with_bias
        )

    def _packed(self, x: Tensor, dtype: torch.dtype) -> BlockWeights:
        ssm, fusion = self.self_attention, self.self_attention.state_fusion
        planes = to_planes(x)
        inner = planes[:, :1].expand(-1, ssm.Ds.numel(), -1, -1)

        def linear_of(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            return pack(weight, bias, dtype, x)

        def conv_of(conv: nn.Conv2d, planes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            packed, bias = pack_depthwise(conv.weight, conv.bias, dtype, planes)
            return conv.weight.detach().to(dtype), packed, bias

        def norm_of(norm: nn.LayerNorm) -> tuple:
            return norm.normalized_shape, norm.weight, norm.bias, norm.eps

        def states_of(*parameters: Tensor) -> list[Tensor]:
            return [one.detach().float() for one in parameters]  # states are float32

        to_x, to_z = ssm.in_proj.weight.chunk(2)
        *fused, Ds, A_logs, delta_bias = states_of(
            *(fusion.kernel_3, fusion.kernel_3_1, fusion.kernel_3_2, fusion.alpha),
            *(ssm.Ds, ssm.A_logs, ssm.dt_projs_bias),
        )
        return BlockWeights(
            cpe1=conv_of(self.cpe1, planes),
            ln_1=norm_of(self.ln_1),
            to_x=linear_of(to_x)[0],
            to_z=linear_of(to_z)[0],
            conv2d=conv_of(ssm.conv2d, inner),
            x_proj=linear_of(ssm.x_proj_weight)[0],
            dt_proj=linear_of(ssm.dt_projs_weight)[0],
            A=-torch.exp(A_logs),
            delta_bias=delta_bias,
            fusion=tuple(fused),
            Ds=Ds,
            out_norm=norm_of(ssm.out_norm),
            out_proj=linear_of(ssm.out_proj.weight, ssm.out_proj.bias),
            cpe2=conv_of(self.cpe2, planes),
            ln_2=norm_of(self.ln_2),
            fc1=linear_of(self.mlp.fc1.weight, self.mlp.fc1.bias),
            fc2=linear_of(self.mlp.fc2.weight, self.mlp.fc2.bias),
        )


def _infer(x: Tensor, w: BlockWeights, sizes: list[int]) -> Tensor:
    """`Block.forward` of tokens x (B, H, W, C), without gradients; `sizes` are those of r, B and C.

    Large tensors have no names, so that each is freed as soon as it has been read.
    """
    x = _depthwise(x, *w.cpe1).add_(x)
    x = _gated(torch.layer_norm(x, *w.ln_1), w, sizes).add_(x)
    x = _depthwise(x, *w.cpe2).add_(x)
    return product(product(torch.layer_norm(x, *w.ln_2), *w.fc1, then="gelu"), *w.fc2).add_(x)


def _gated(x: Tensor, w: BlockWeights, sizes: list[int]) -> Tensor:
    y = _observed(_depthwise(product(x, w.to_x), *w.conv2d, then="swish"), w, sizes)
    y = torch.layer_norm(to_tokens(y), *w.out_norm)
    return product(y.mul_(product(x, w.to_z, then="swish")), *w.out_proj)


def _observed(x: Tensor, w: BlockWeights, sizes: list[int]) -> Tensor:
    """`StructureAwareSSM.ssm` of tokens (B, H, W, D) -> planes (B, D, H, W)."""
    r, B, C = product(x, w.x_proj).split(sizes, dim=-1)
    h = SCAN(_sequence(x), _sequence(product(r, w.dt_proj)), w.A, _sequence(B), w.delta_bias, delta_softplus=True)
    return FUSION(h.unflatten(3, x.shape[1:3]), *w.fusion, to_planes(C), w.Ds, to_planes(x))


def _sequence(tokens: Tensor) -> Tensor:
    return tokens.flatten(1, 2).mT


SCAN = torch.ops.selective_scan.selective_scan_state.default  # arguments are checked there, too
FUSION = torch.ops.dwconv2d.state_fusion_output.default
CONVOLUTION = torch.ops.dwconv2d.dilated_dwconv2d.default


def _depthwise(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    """The depthwise 3x3 convolution of tokens, by oneDNN if they are many, and then "none" or "swish"."""
    planes = to_planes(x)
    if _is_large(planes) and x.dtype == torch.bfloat16:
        return to_tokens(depthwise(planes, packed, bias, then))
    y = to_tokens(CONVOLUTION(planes, weight, bias, 1, "zeros"))
    return F.silu(y) if then == "swish" else y


def _is_large(planes: Tensor) -> bool:
    return planes.numel() > LARGE and planes.stride(1) == 1


def _fits(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether a layer's bias has the shape that PyTorch's own layer checks."""
    return bias is None or bias.shape == weight.shape[:1]


def _is_hooked(*modules: nn.Module) -> bool:
    """Whether calling one of the modules does more than its class does, so that it must be called."""
    return any(GLOBAL_HOOKS) or any(map(has_hooks, modules))


def _is_patched() -> bool:
    """Whether a method of a class has been replaced since this module was imported: what is here would not call it."""
    return [getattr(*place) for place in _WATCHED] != _WATCHED_METHODS


_CLASSES = (
    *(Block, ConvLayer, DropPath, Mlp, StateFusion, StructureAwareSSM),
    *(nn.BatchNorm2d, nn.Conv2d, nn.GELU, nn.LayerNorm, nn.Linear, nn.ReLU),
)
_WATCHED = [
    (kind, name)
    for kind in _CLASSES
    for name, value in inspect.getmembers(kind, inspect.isfunction)
    if name in ("forward", "_conv_forward")
    or (name in vars(kind) and value.__module__ == Block.__module__ and name != "__init__")
]
_WATCHED_METHODS = [getattr(*place) for place in _WATCHED]
_OF_BLOCK = (  # layers of a block in the order of `PrepackedBlock._sources`
    *(PrepackedDepthwiseConv2d, nn.LayerNorm, CpuStructureAwareSSM),
    *(PrepackedLinear, PrepackedDepthwiseConv2d, StateFusion, nn.LayerNorm, PrepackedLinear),
    *(DropPath, PrepackedDepthwiseConv2d, nn.LayerNorm, Mlp, PrepackedLinear, nn.GELU, PrepackedLinear),
)
_LAYER, _OF_SSM = ("weight", "bias"), ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
_OF_FUSION = ("kernel_3", "kernel_3_1", "kernel_3_2", "alpha")
_PARAMETERS = (  # in the same order
    *(*_LAYER, *_LAYER, *_OF_SSM, *_LAYER, *_LAYER, *_OF_FUSION, *_LAYER, *_LAYER),
    *(*_LAYER, *_LAYER, *_LAYER, *_LAYER),
)
_METHODS = {*vars(Block), *vars(StructureAwareSSM), *vars(CpuStructureAwareSSM)} - {"__module__", "__doc__"}
_CONVOLUTIONS = (nn.Conv2d, CpuPointwiseConv2d, CpuStridedConv2d, CpuDepthwiseConv2d)
_PLAIN = {
    CpuLinear: nn.Linear,
    PrepackedLinear: nn.Linear,
    CpuPointwiseConv2d: nn.Conv2d,
    CpuStridedConv2d: nn.Conv2d,
    CpuDepthwiseConv2d: nn.Conv2d,
    PrepackedDepthwiseConv2d: nn.Conv2d,
    CpuStructureAwareSSM: StructureAwareSSM,
    PrepackedConvLayer: ConvLayer,
    PrepackedBlock: Block,
}
_PREPACKED = {
    CpuLinear: PrepackedLinear,
    CpuDepthwiseConv2d: PrepackedDepthwiseConv2d,
    ConvLayer: PrepackedConvLayer,
    Block: PrepackedBlock,
}


def optimise_for_cpu(model: nn.Module, prepack_weights: bool = False) -> nn.Module:
    """Change the classes of `model`'s modules in place to the classes above. Return `model`.

    Parameters, names, hooks and modes stay the same. Results differ by rounding alone. The modules work in training and
    in evaluation, also inside a whole detector. On other devices, they do what they did before. Only modules change
    whose class is exactly PyTorch's or this repository's: adapters and quantised layers stay. None changes if a method
    of these classes has been replaced. The process keeps freed memory from then on, see `keep_freed_memory`.

    Args:
        model: the model.
        prepack_weights: for inference, keep a copy of the weights that is cast and packed once: in bfloat16 under
            autocast or for a model in bfloat16, and in float32 where oneDNN leads. If a weight changes, its copy is
            made anew. But a change through `.data`, NumPy, `torch.distributed`, or another tensor or process that
            shares the memory may not be seen until `model.eval()` or `model.train()` is called.
    """
    keep_freed_memory()
    for module in model.modules():
        swapped = _class_for(module)
        if prepack_weights:
            swapped = _PREPACKED.get(swapped or type(module), swapped)
        if swapped is not None:
            module.__class__ = swapped
    return model


def undo_optimise_for_cpu(model: nn.Module) -> nn.Module:
    """Restore in place the classes that `optimise_for_cpu` changed. Return `model`."""
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__dict__.pop("_prepacked", None)
            module.__class__ = _PLAIN[type(module)]
    return model


def _class_for(module: nn.Module) -> type[nn.Module] | None:
    if _is_patched():
        return None
    if type(module) is nn.Linear:
        return CpuLinear
    if type(module) is StructureAwareSSM:
        return CpuStructureAwareSSM
    return class_by_geometry(module) if type(module) is nn.Conv2d else None


def class_by_geometry(conv: nn.Conv2d) -> type[nn.Conv2d] | None:
    """Return the class above that computes such a convolution. Tools change the geometry of a layer at any time."""
    if conv.padding_mode != "zeros" or "_conv_forward" in conv.__dict__:  # an own one may pad otherwise
        return None
    if nn.Conv2d.forward is not _CONV or nn.Conv2d._conv_forward is not _CONV_FORWARD:
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
