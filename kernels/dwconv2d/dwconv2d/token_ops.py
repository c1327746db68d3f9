"""Operators between the tokens of a block, (B, H, W, D), and the planes of its scan, (B, D, H, W).

Each operator replaces several passes over memory on a GPU, where Triton's kernels run it. Elsewhere, it is plain
PyTorch. Parameters may be float32 while tokens have 16 bits: the operators cast them. Everything is computed in float32
(float64 for float64) and rounded once, when it is stored.
"""

import torch
from torch import Tensor

from dwconv2d import loading
from dwconv2d import token_reference as reference

_SILU = "Tensor x, Tensor weight, Tensor bias"
_MORE = "Tensor? grad_2=None, Tensor? grad_3=None"
_NORM = "Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps"
_NORM_BACKWARD = "Tensor grad_r, Tensor grad_n, Tensor r, Tensor x, Tensor weight, Tensor norm_weight, float eps"
_UPDATE = "Tensor? update=None, Tensor? scale=None"
_SCHEMAS = {
    "depthwise_silu": f"({_SILU}) -> Tensor",
    "depthwise_silu_backward": f"(Tensor grad, {_SILU}, {_MORE}) -> (Tensor, Tensor, Tensor)",
    "depthwise_residual_norm": f"({_NORM}, {_UPDATE}) -> (Tensor, Tensor)",
    "depthwise_residual_norm_backward": f"({_NORM_BACKWARD}, {_UPDATE}) -> ({', '.join(['Tensor'] * 6)})",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"dwconv2d::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    loading.register(getattr(reference, _name), triton_module="token_triton", has_compiled_kernels=False)


@torch.library.register_fake("dwconv2d::depthwise_silu")
def _silu_fake(x, weight, bias):
    reference.check_silu_inputs(x, weight, bias)
    batch, height, width, channels = x.shape
    return x.new_empty((batch, channels, height, width))


@torch.library.register_fake("dwconv2d::depthwise_silu_backward")
def _silu_backward_fake(grad, x, weight, bias, grad_2=None, grad_3=None):
    reference.check_silu_backward_inputs(grad, x, weight, bias, grad_2, grad_3)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@torch.library.register_fake("dwconv2d::depthwise_residual_norm")
def _residual_norm_fake(x, weight, bias, norm_weight, norm_bias, eps, update=None, scale=None):
    reference.check_residual_norm_inputs(x, weight, bias, norm_weight, norm_bias, update, scale)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("dwconv2d::depthwise_residual_norm_backward")
def _residual_norm_backward_fake(grad_r, grad_n, r, x, weight, norm_weight, eps, update=None, scale=None):
    reference.check_residual_norm_backward_inputs(grad_r, grad_n, r, x, weight, norm_weight, update, scale)
    channels = x.shape[-1:]
    shapes = (weight.shape, channels, channels, channels)
    dtype = reference.computed_dtype(x)
    parameters = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return x.new_empty(x.shape), *parameters, x.new_empty(0 if scale is None else x.shape)


# csrc/autograd.cpp has the same functions, and takes precedence where it is compiled: change both.
def _silu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _silu_backward(ctx, grad):
    return loading.call("depthwise_silu_backward", grad, *ctx.saved_tensors)


class _SeveralUses(torch.autograd.Function):
    """`depthwise_silu` with one result for each use, in the same memory. The backward kernel adds their gradients.

    This is not an operator, because an operator may not return the same memory twice.
    """

    @staticmethod
    def forward(x, weight, bias, uses):
        y = loading.call("depthwise_silu", x, weight, bias)
        return y, *(y.detach() for _ in range(uses - 1))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        first, *more = [grad for grad in grads if grad is not None]
        return *loading.call("depthwise_silu_backward", first, *ctx.saved_tensors, *more), None


# csrc/autograd.cpp has the same functions, and takes precedence where it is compiled: change both.
def _residual_norm_setup(ctx, inputs, output):
    x, weight, bias, norm_weight, norm_bias, ctx.eps, update, scale = inputs
    ctx.dtypes = [t.dtype for t in (weight, bias, norm_weight, norm_bias)]
    ctx.save_for_backward(output[0], x, weight, norm_weight, update, scale)


def _residual_norm_backward(ctx, grad_r, grad_n):
    r, x, weight, norm_weight, update, scale = ctx.saved_tensors
    inputs = (grad_r, grad_n, r, x, weight, norm_weight, ctx.eps, update, scale)
    grad_s, *parameters, grad_update = loading.call("depthwise_residual_norm_backward", *inputs)
    parameters = [grad.to(dtype) for grad, dtype in zip(parameters, ctx.dtypes, strict=True)]
    if update is None:
        grad_update = None
    elif scale is None:
        grad_update = grad_s
    return grad_s, *parameters, None, grad_update, None


loading.register_autograd("depthwise_silu", _silu_backward, _silu_setup)
loading.register_autograd("depthwise_residual_norm", _residual_norm_backward, _residual_norm_setup)
loading.refuse_second_derivatives("depthwise_silu", "depthwise_residual_norm")


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor, uses: int = 1) -> Tensor | tuple[Tensor, ...]:
    """Depthwise 3x3 convolution and SiLU, from tokens to planes: y = c sigmoid(c), c = bias + dwconv3x3(x).

    Outside the image x is 0. The backward pass recomputes c, so only the inputs are saved.

    Args:
        x: tokens, (B, H, W, D), float16, bfloat16, float32 or float64, with any strides: a view such
            as `projection.chunk(2, -1)[0]` is read without a copy.
        weight, bias: (D, 1, 3, 3) and (D,), of any floating dtype, float64 if and only if x is.
        uses: how often y is used, at most 3. Give each use its own result: the backward kernel then adds their
            gradients. Otherwise, PyTorch would add each two gradients in a pass over memory.

    Returns:
        y, planes (B, D, H, W), contiguous, x's dtype. Under autocast, x is cast to the autocast dtype first. With
        `uses` above 1, a tuple of `uses` tensors, which share memory: do not change one in place.

    Raises:
        ValueError: a shape, device or `uses` does not fit; the message names the argument.
        TypeError: a type or dtype does not fit; the message names the argument.
        NotImplementedError: an input has a tangent of forward-mode differentiation.
    """
    loading.check_tensors(x=x, weight=weight, bias=bias)
    if uses not in (1, 2, 3):
        raise ValueError(f"uses must be 1, 2 or 3, got {uses}")
    if (cast_to := loading.autocast_dtype(x)) is not None:
        x = loading.cast(x, cast_to)
    if uses > 1 and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return _SeveralUses.apply(x, weight, bias, uses)
    y = loading.call("depthwise_silu", x, weight, bias)
    return y if uses == 1 else (y,) * uses


def depthwise_residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    update: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual, a depthwise 3x3 convolution with a residual, and the LayerNorm that follows, in one pass.

    s = x + scale * update, r = s + bias + dwconv3x3(s), n = LayerNorm(r) over the channels. Outside the image s is 0.
    n is the norm of the returned r, which is rounded to x's dtype.

    Args:
        x: tokens, (B, H, W, D), float16, bfloat16, float32 or float64, with any strides.
        weight, bias: the convolution's, (D, 1, 3, 3) and (D,), of any floating dtype, float64 if and only if x is.
        norm_weight, norm_bias: the norm's, (D,); the same rule holds for their dtypes.
        eps: added to the variance.
        update: added to x, with x's shape and dtype; None adds nothing.
        scale: factor of each image's update, (B,), as stochastic depth draws it; None for 1. It gets no gradient.

    Returns:
        r and n, (B, H, W, D), contiguous, x's dtype. Under autocast, x and update are cast to the autocast dtype first.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a type or dtype does not fit; the message names the argument.
        NotImplementedError: an input has a tangent of forward-mode differentiation.
    """
    optional = {name: t for name, t in (("update", update), ("scale", scale)) if t is not None}
    parameters = dict(weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    loading.check_tensors(x=x, **parameters, **optional)
    if (cast_to := loading.autocast_dtype(x)) is not None:
        x = loading.cast(x, cast_to)
        update = None if update is None else loading.cast(update, cast_to)
    if scale is not None:
        scale = scale.detach()
    return loading.call("depthwise_residual_norm", x, *parameters.values(), eps, update, scale)
