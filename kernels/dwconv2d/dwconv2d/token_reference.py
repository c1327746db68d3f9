"""The operators on tokens in plain PyTorch: the specification, and the kernels for devices without their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ----- argument checks, shared with the fake kernels


def check_silu_inputs(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise a ValueError or TypeError that names the first argument of `depthwise_silu` that does not fit."""
    _check_convolution(x, weight)
    check_parameter(x, "bias", bias, tuple(x.shape[-1:]))


def _check_convolution(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must be (batch, height, width, channels), where only batch may be 0, got shape {tuple(x.shape)}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    check_parameter(x, "weight", weight, (x.shape[-1], 1, 3, 3))


def check_silu_backward_inputs(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, grad_2: Tensor | None, grad_3: Tensor | None
) -> None:
    """Raise a ValueError or TypeError that names the first argument of the backward operator that does not fit."""
    check_silu_inputs(x, weight, bias)
    for name, tensor in (("grad", grad), ("grad_2", grad_2), ("grad_3", grad_3)):
        if tensor is not None:
            check_grad(name, tensor, (x.shape[0], x.shape[3], *x.shape[1:3]), x)


def check_residual_norm_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    update: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Raise a ValueError or TypeError that names the first argument that does not fit."""
    check_silu_inputs(x, weight, bias)
    check_parameter(x, "norm_weight", norm_weight, tuple(x.shape[-1:]))
    check_parameter(x, "norm_bias", norm_bias, tuple(x.shape[-1:]))
    _check_update(x, update, scale)


def check_residual_norm_backward_inputs(
    grad_r: Tensor,
    grad_n: Tensor,
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    update: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Raise a ValueError or TypeError that names the first argument of the backward operator that does not fit."""
    _check_convolution(x, weight)
    check_parameter(x, "norm_weight", norm_weight, tuple(x.shape[-1:]))
    _check_update(x, update, scale)
    for name, tensor in (("grad_r", grad_r), ("grad_n", grad_n), ("r", r)):
        check_grad(name, tensor, tuple(x.shape), x)


def _check_update(x: Tensor, update: Tensor | None, scale: Tensor | None) -> None:
    if update is not None:
        check_parameter(x, "update", update, tuple(x.shape))
        if update.dtype != x.dtype:
            raise TypeError(f"update must be {x.dtype} as x is, got {update.dtype}")
    if scale is not None:
        if update is None:
            raise ValueError("scale is given without an update, which it scales")
        check_parameter(x, "scale", scale, tuple(x.shape[:1]))


def check_grad(name: str, grad: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise a ValueError or TypeError if a gradient does not have the shape, dtype and device of its result."""
    check_parameter(like, name, grad, shape)
    if grad.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} as x is, got {grad.dtype}")


def check_parameter(x: Tensor, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Parameters may have another floating dtype than x, because autocast leaves them in float32."""
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must be {tuple(shape)} for x of shape {tuple(x.shape)}, got shape {tuple(tensor.shape)}"
        )
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"{name} must be float64 exactly if x is, got {tensor.dtype} with {x.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}")


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the computation. Results are then rounded to x's dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ----- depthwise 3x3 and SiLU


def _planes(tokens: Tensor) -> Tensor:
    return tokens.permute(0, 3, 1, 2)


def _convolve(planes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The planes are in `computed_dtype`."""
    dtype = planes.dtype
    return F.conv2d(planes, weight.to(dtype), bias.to(dtype), padding=1, groups=planes.shape[1])


def _convolution_backward(grad: Tensor, planes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = planes.shape[1]
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], channels, [True, True, True])
    grads = torch.ops.aten.convolution_backward(grad, planes, weight.to(planes.dtype), [channels], *geometry)
    return grads[0], grads[1].contiguous(), grads[2]


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`dwconv2d.depthwise_silu` without its gradient."""
    check_silu_inputs(x, weight, bias)
    c = _convolve(_planes(x).to(computed_dtype(x)), weight, bias)
    return F.silu(c).to(x.dtype).contiguous()


def depthwise_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_2: Tensor | None = None,
    grad_3: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `depthwise_silu` for x, weight and bias, from the sum of up to three gradients of its planes."""
    check_silu_backward_inputs(grad, x, weight, bias, grad_2, grad_3)
    planes = _planes(x).to(computed_dtype(x))
    c = _convolve(planes, weight, bias)
    gate = torch.sigmoid(c)
    total = sum(g.to(c.dtype) for g in (grad, grad_2, grad_3) if g is not None)
    grad_c = total * (gate * (1 + c * (1 - gate)))
    grad_x, grad_weight, grad_bias = _convolution_backward(grad_c, planes, weight)
    grad_x = grad_x.permute(0, 2, 3, 1).to(x.dtype).contiguous()
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


# ----- depthwise 3x3, residual and LayerNorm


def _add_update(x: Tensor, update: Tensor | None, scale: Tensor | None) -> Tensor:
    """s = x + scale * update, as planes in `computed_dtype`."""
    s = x.to(computed_dtype(x))
    if update is not None:
        update = update.to(s.dtype)
        s = s + (update if scale is None else scale.to(s.dtype)[:, None, None, None] * update)
    return _planes(s)


def depthwise_residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    update: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dwconv2d.depthwise_residual_norm` without its gradient."""
    check_residual_norm_inputs(x, weight, bias, norm_weight, norm_bias, update, scale)
    s = _add_update(x, update, scale)
    r = (s + _convolve(s, weight, bias)).permute(0, 2, 3, 1).to(x.dtype).contiguous()
    stored_r = r.to(s.dtype)
    n = F.layer_norm(stored_r, r.shape[-1:], norm_weight.to(s.dtype), norm_bias.to(s.dtype), eps)
    return r, n.to(x.dtype)


def depthwise_residual_norm_backward(
    grad_r: Tensor,
    grad_n: Tensor,
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    update: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `depthwise_residual_norm` for s, weight, bias, norm_weight, norm_bias and, with a scale, update.

    Without a scale, the update's gradient is that of s, and the last result is empty. r is the forward pass's result.
    Gradients of parameters are float32, or float64 for float64.
    """
    check_residual_norm_backward_inputs(grad_r, grad_n, r, x, weight, norm_weight, update, scale)
    dtype, shape = computed_dtype(x), x.shape[-1:]
    r, weight_of_norm = r.to(dtype), norm_weight.to(dtype)
    _, mean, rstd = torch.native_layer_norm(r, shape, weight_of_norm, None, eps)
    grad, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
        grad_n.to(dtype), r, shape, mean, rstd, weight_of_norm, torch.zeros_like(weight_of_norm), [True, True, True]
    )
    grad = _planes(grad + grad_r.to(dtype))
    grad_s, grad_weight, grad_bias = _convolution_backward(grad, _add_update(x, update, scale), weight)
    grad_s = (grad_s + grad).permute(0, 2, 3, 1)
    grad_update = x.new_empty(0) if scale is None else (grad_s * scale.to(dtype)[:, None, None, None]).to(x.dtype)
    results = grad_s.to(x.dtype).contiguous(), grad_weight, grad_bias, grad_norm_weight, grad_norm_bias
    return *results, grad_update.contiguous()
