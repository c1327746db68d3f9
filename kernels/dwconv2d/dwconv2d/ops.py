"""The operators of `dwconv2d`: schemas, fake kernels, autograd, and the plain-PyTorch kernels.

Compiled kernels register for their own device under the same names; PyTorch's dispatcher chooses.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dwconv2d import reference

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


def _without_autocast(kernel: Callable) -> Callable:
    """Autocast is still on inside a kernel, and would run its convolutions in 16 bits."""

    @functools.wraps(kernel)
    def run(first: Tensor, *args, **kwargs):
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *args, **kwargs)

    return run


for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"dwconv2d::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"dwconv2d::{_name}", "default", _without_autocast(getattr(reference, _name)))


def _empty_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


@torch.library.register_fake("dwconv2d::dilated_dwconv2d")
def _conv_fake(x, weight, bias=None, dilation=1, padding_mode="replicate"):
    reference.check_conv_inputs(x, weight, bias, dilation, padding_mode)
    return x.new_empty(x.shape)


@torch.library.register_fake("dwconv2d::dilated_dwconv2d_backward")
def _conv_backward_fake(grad, x, weight, dilation=1, padding_mode="replicate"):
    return (*_empty_like(x, weight), weight.new_empty(weight.shape[:1]))


@torch.library.register_fake("dwconv2d::state_fusion")
def _fusion_fake(h, *weights):
    reference.check_fusion_inputs(h, *weights)
    return h.new_empty(h.shape)


@torch.library.register_fake("dwconv2d::state_fusion_backward")
def _fusion_backward_fake(grad, *inputs):
    return _empty_like(*inputs)


@torch.library.register_fake("dwconv2d::state_fusion_output")
def _output_fake(*inputs):
    reference.check_output_inputs(*inputs)
    x = inputs[-1]
    return x.new_empty(x.shape)


@torch.library.register_fake("dwconv2d::state_fusion_output_backward")
def _output_backward_fake(grad, *inputs):
    return _empty_like(*inputs)


def _conv_setup(ctx, inputs, output):
    x, weight, bias, ctx.dilation, ctx.padding_mode = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _conv_backward(ctx, grad):
    backward = torch.ops.dwconv2d.dilated_dwconv2d_backward
    grad_x, grad_weight, grad_bias = backward(grad, *ctx.saved_tensors, ctx.dilation, ctx.padding_mode)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _fusion_backward(ctx, grad):
    return torch.ops.dwconv2d.state_fusion_backward(grad, *ctx.saved_tensors)


def _output_backward(ctx, grad):
    return torch.ops.dwconv2d.state_fusion_output_backward(grad, *ctx.saved_tensors)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError("dwconv2d operators have no second derivative: their backward cannot be differentiated")


torch.library.register_autograd("dwconv2d::dilated_dwconv2d", _conv_backward, setup_context=_conv_setup)
torch.library.register_autograd("dwconv2d::state_fusion", _fusion_backward, setup_context=_save_inputs)
torch.library.register_autograd("dwconv2d::state_fusion_output", _output_backward, setup_context=_save_inputs)
for _name in ("dilated_dwconv2d", "state_fusion", "state_fusion_output"):
    torch.library.register_autograd(f"dwconv2d::{_name}_backward", _no_double_backward)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast wants x's activations in, or None where it does not apply."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled and x.dtype != torch.float64 else None


def dilated_dwconv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, padding_mode: str = "replicate"
) -> Tensor:
    """Depthwise 2-D convolution with stride 1 that keeps the plane's size, computed in float32 (float64 for float64).

    y(p) = bias + sum over taps o of weight(o) x(p + dilation o), per channel, o running over the kernel's window
    around 0. Outside the plane x is the nearest border value ("replicate") or 0 ("zeros").

    Args:
        x: (B, D, H, W), float16, bfloat16, float32 or float64.
        weight: (D, 1, kh, kw), kh and kw odd, x's dtype.
        bias: (D,), x's dtype.
        dilation: distance between taps, at least 1.
        padding_mode: "replicate" or "zeros".

    Returns:
        y, (B, D, H, W), contiguous, x's dtype. Under autocast everything is cast to the autocast dtype first.

    Raises:
        ValueError: a shape, device, dilation or padding mode does not fit; the message names the argument.
        TypeError: a dtype does not fit; the message names the argument.
    """
    if (half := _autocast_dtype(x)) is not None:
        x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
    return torch.ops.dwconv2d.dilated_dwconv2d(x, weight, bias, dilation, padding_mode)


def state_fusion(h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor) -> Tensor:
    """Structure-aware state fusion of Spatial-Mamba (arXiv 2410.15091): each state joined with its neighbours.

    h' = sum over k of alpha_k dwconv3x3(h, W_k, dilation d_k) with dilations d = 1, 3, 5 and replicate padding.

    Args:
        h: states, (B, D, H, W), or (B, D, N, H, W) where the N states of a channel share its kernels;
            float32 or float64, never 16-bit.
        weight3, weight3_d3, weight3_d5: kernels for dilation 1, 3 and 5, (D, 1, 3, 3), h's dtype.
        alpha: weight of each dilation, (3,), h's dtype.

    Returns:
        h', contiguous, h's shape and dtype. Under autocast everything is cast to float32 first.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a dtype does not fit; the message names the argument.
    """
    inputs = (h, weight3, weight3_d3, weight3_d5, alpha)
    if _autocast_dtype(h) is not None:
        inputs = tuple(t.float() for t in inputs)
    return torch.ops.dwconv2d.state_fusion(*inputs)


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
    """State fusion and the observation equation of Spatial-Mamba (arXiv 2410.15091) in one operator.

    y = sum_n C_n h'_n + D x, with h' = state_fusion(h, weight3, weight3_d3, weight3_d5, alpha).

    Args:
        h, weight3, weight3_d3, weight3_d5, alpha: as for `state_fusion`.
        C: output matrix, (B, N, H, W), N = 1 for h of four dimensions; x's dtype.
        D: skip weight, (D,), h's dtype.
        x: the scan's input, (B, D, H, W), float16, bfloat16, float32, or float64 if h is.

    Returns:
        y, (B, D, H, W), contiguous, x's dtype; computed in h's dtype. Under autocast C and x are cast to the
        autocast dtype, all else to float32.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a dtype does not fit; the message names the argument.
    """
    weights = (weight3, weight3_d3, weight3_d5, alpha, D)
    if (half := _autocast_dtype(x)) is not None:
        h, C, x = h.float(), C.to(half), x.to(half)
        weights = tuple(t.float() for t in weights)
    *kernels, D = weights
    return torch.ops.dwconv2d.state_fusion_output(h, *kernels, C, D, x)
