"""The operators on planes, `dilated_dwconv2d`, `state_fusion` and `state_fusion_output`: schemas, kernels, autograd.

token_ops.py and mlp_ops.py have the other operators.

PyTorch's dispatcher chooses among three kernels: the compiled one, which csrc/cpu/planes.cpp or csrc/cuda/planes.cpp
registers, Triton's of plane_triton.py, and plain PyTorch's of plane_reference.py.
"""

import math

import torch
from torch import Tensor, nn

from dwconv2d import loading
from dwconv2d import plane_reference as reference

_CONV = "Tensor x, Tensor weight, Tensor? bias=None, int dilation=1, str padding_mode='replicate'"
_CONV_BACKWARD = "Tensor grad, Tensor x, Tensor weight, int dilation=1, str padding_mode='replicate'"
_FUSION = "Tensor h, Tensor weight3, Tensor weight3_d3, Tensor weight3_d5, Tensor alpha"
_OUTPUT = f"{_FUSION}, Tensor C, Tensor D, Tensor x"


def _returns(count: int) -> str:
    return "(" + ", ".join(["Tensor"] * count) + ")"


_SCHEMAS = {
    "dilated_dwconv2d": f"({_CONV}) -> Tensor",
    "dilated_dwconv2d_backward": f"({_CONV_BACKWARD}) -> {_returns(3)}",
    "state_fusion": f"({_FUSION}) -> Tensor",
    "state_fusion_backward": f"(Tensor grad, {_FUSION}) -> {_returns(5)}",
    "state_fusion_output": f"({_OUTPUT}) -> Tensor",
    "state_fusion_output_backward": f"(Tensor grad, {_OUTPUT}) -> {_returns(8)}",
}


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"dwconv2d::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    loading.register(getattr(reference, _name), triton_module="plane_triton", has_compiled_kernels=True)


def _empty_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


def _empty_laid_out_as(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=reference.memory_format(x))


@torch.library.register_fake("dwconv2d::dilated_dwconv2d")
def _conv_fake(x, weight, bias=None, dilation=1, padding_mode="replicate"):
    reference.check_conv_inputs(x, weight, bias, dilation, padding_mode)
    return _empty_laid_out_as(x)


@torch.library.register_fake("dwconv2d::dilated_dwconv2d_backward")
def _conv_backward_fake(grad, x, weight, dilation=1, padding_mode="replicate"):
    reference.check_conv_inputs(x, weight, None, dilation, padding_mode)
    reference.check_grad(grad, x)
    return _empty_laid_out_as(x), *_empty_contiguous(weight), weight.new_empty(weight.shape[:1])


@torch.library.register_fake("dwconv2d::state_fusion")
def _fusion_fake(h, *weights):
    reference.check_fusion_inputs(h, *weights)
    return h.new_empty(h.shape)


@torch.library.register_fake("dwconv2d::state_fusion_backward")
def _fusion_backward_fake(grad, h, *weights):
    reference.check_fusion_inputs(h, *weights)
    reference.check_grad(grad, h)
    return _empty_contiguous(h, *weights)


@torch.library.register_fake("dwconv2d::state_fusion_output")
def _output_fake(*inputs):
    reference.check_output_inputs(*inputs)
    return _empty_laid_out_as(inputs[-1])


@torch.library.register_fake("dwconv2d::state_fusion_output_backward")
def _output_backward_fake(grad, *inputs):
    reference.check_output_inputs(*inputs)
    *others, x = inputs
    reference.check_grad(grad, x)
    return *_empty_contiguous(*others), _empty_laid_out_as(x)


def _conv_setup(ctx, inputs, output):
    x, weight, bias, ctx.dilation, ctx.padding_mode = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _conv_backward(ctx, grad):
    inputs = (*ctx.saved_tensors, ctx.dilation, ctx.padding_mode)
    grad_x, grad_weight, grad_bias = loading.call("dilated_dwconv2d_backward", grad, *inputs)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _fusion_backward(ctx, grad):
    return loading.call("state_fusion_backward", grad, *ctx.saved_tensors)


# csrc/autograd.cpp has the same function, and takes precedence where it is compiled: change both.
def _output_backward(ctx, grad):
    return loading.call("state_fusion_output_backward", grad, *ctx.saved_tensors)


loading.register_autograd("dilated_dwconv2d", _conv_backward, _conv_setup)
loading.register_autograd("state_fusion", _fusion_backward, _save_inputs)
loading.register_autograd("state_fusion_output", _output_backward, _save_inputs)
loading.refuse_second_derivatives("dilated_dwconv2d", "state_fusion", "state_fusion_output")


def dilated_dwconv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, padding_mode: str = "replicate"
) -> Tensor:
    """Depthwise 2-D convolution with stride 1 that keeps the plane's size, computed in float32 (float64 for float64).

    For each channel, y(p) = bias + sum over taps o of weight(o) x(p + dilation o), where o runs over the kernel's
    window around 0. Outside the plane, x is the nearest border value ("replicate") or 0 ("zeros").

    Args:
        x: (B, D, H, W), float16, bfloat16, float32 or float64.
        weight: (D, 1, kh, kw), kh and kw odd, x's dtype.
        bias: (D,), x's dtype.
        dilation: distance between taps, at least 1.
        padding_mode: "replicate" or "zeros".

    Returns:
        y, (B, D, H, W), x's dtype, channels-last if x is, else contiguous. Under autocast, everything is cast to the
        autocast dtype first.

    Raises:
        ValueError: a shape, device, dilation or padding mode does not fit; the message names the argument.
        TypeError: a type or dtype does not fit; the message names the argument.
        NotImplementedError: an input has a tangent of forward-mode differentiation.
    """
    # A tuple, because torch.compile of PyTorch 2.7 does not support int | torch.SymInt.
    if isinstance(dilation, bool) or not isinstance(dilation, (int, torch.SymInt)):
        raise TypeError(f"dilation must be an integer, got {dilation!r}")
    loading.check_tensors(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if (cast_to := loading.autocast_dtype(x)) is not None:
        x, weight = loading.cast(x, cast_to), loading.cast(weight, cast_to)
        bias = None if bias is None else loading.cast(bias, cast_to)
    return loading.call("dilated_dwconv2d", x, weight, bias, dilation, padding_mode)


def state_fusion(h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor) -> Tensor:
    """Structure-aware state fusion of Spatial-Mamba (arXiv 2410.15091): it fuses each state with its neighbours.

    h' = sum over k of alpha_k dwconv3x3(h, W_k, dilation d_k) with dilations d = 1, 3, 5 and replicate padding.

    Args:
        h: states, (B, D, H, W), or (B, D, N, H, W), where the N states of a channel share its kernels;
            float32 or float64, never 16-bit.
        weight3, weight3_d3, weight3_d5: kernels for dilation 1, 3 and 5, (D, 1, 3, 3), h's dtype.
        alpha: weight of each dilation, (3,), h's dtype.

    Returns:
        h', contiguous, h's shape and dtype. Under autocast, everything is cast to float32 first.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a type or dtype does not fit; the message names the argument.
        NotImplementedError: an input has a tangent of forward-mode differentiation.
    """
    inputs = dict(h=h, weight3=weight3, weight3_d3=weight3_d3, weight3_d5=weight3_d5, alpha=alpha)
    loading.check_tensors(**inputs)
    if loading.autocast_dtype(h) is not None:
        inputs = {name: loading.cast(t, torch.float32) for name, t in inputs.items()}
    return loading.call("state_fusion", *inputs.values())


def state_fusion_output(
    h: Tensor,
    weight3: Tensor,
    weight3_d3: Tensor,
    weight3_d5: Tensor,
    alpha: Tensor,
    C: Tensor,
    D: Tensor,
    x: Tensor,
) -> Tensor:
    """State fusion and the output equation of Spatial-Mamba (arXiv 2410.15091) in one operator.

    y = sum_n C_n h'_n + D x, with h' = state_fusion(h, weight3, weight3_d3, weight3_d5, alpha).

    Args:
        h, weight3, weight3_d3, weight3_d5, alpha: as for `state_fusion`.
        C: output matrix, (B, N, H, W), N = 1 for h of four dimensions; x's dtype.
        D: skip weight, (D,), h's dtype.
        x: the scan's input, (B, D, H, W), float16, bfloat16, float32, or float64 if h is.

    Returns:
        y, (B, D, H, W), x's dtype, channels-last if x is, else contiguous; computed in h's dtype. Under autocast, C
        and x are cast to the autocast dtype, and everything else to float32.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a type or dtype does not fit; the message names the argument.
        NotImplementedError: an input has a tangent of forward-mode differentiation.
    """
    states = dict(h=h, weight3=weight3, weight3_d3=weight3_d3, weight3_d5=weight3_d5, alpha=alpha, D=D)
    loading.check_tensors(**states, C=C, x=x)
    if (cast_to := loading.autocast_dtype(x)) is not None:
        states = {name: loading.cast(t, torch.float32) for name, t in states.items()}
        C, x = loading.cast(C, cast_to), loading.cast(x, cast_to)
    *weights, D = states.values()
    return loading.call("state_fusion_output", *weights, C, D, x)


class DilatedDWConv2d(nn.Module):
    """`dilated_dwconv2d` as a module.

    The parameters have the names, shapes and initialisation of those of `nn.Conv2d(groups=channels)`.

    Args:
        channels: D, the number of channels of input and output.
        kernel_size: odd, or two odd numbers for height and width.
        dilation: distance between taps, at least 1.
        bias: whether there is a bias.
        padding_mode: "zeros" or "replicate".

    Raises:
        ValueError: a size or the padding mode is not valid.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        dilation: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kernel = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size, kernel_size)
        if len(kernel) != 2 or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel_size must be one or two odd numbers, got {kernel_size!r}")
        for name, number in (("channels", channels), ("dilation", dilation)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a number of at least 1, got {number!r}")
        if padding_mode not in reference.PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {reference.PADDING_MODES}, got {padding_mode!r}")
        self.kernel_size, self.dilation, self.padding_mode = tuple(kernel), dilation, padding_mode
        self.weight = nn.Parameter(torch.empty(channels, 1, *kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw uniformly between plus and minus 1 / sqrt(kh kw), PyTorch's default for convolutions."""
        bound = math.prod(self.kernel_size) ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return dilated_dwconv2d(x, self.weight, self.bias, self.dilation, self.padding_mode)

    def extra_repr(self) -> str:
        return (
            f"{self.weight.shape[0]}, kernel_size={self.kernel_size}, dilation={self.dilation}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )
