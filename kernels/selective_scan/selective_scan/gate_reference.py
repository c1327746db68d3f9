"""The gated norm in plain PyTorch: the specification, and the kernel for devices without their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise a ValueError or TypeError that names the first argument that does not fit the others."""
    if y.dim() != 4 or 0 in y.shape[1:]:
        raise ValueError(
            f"y must be (batch, channels, height, width), where only batch may be 0, got shape {tuple(y.shape)}"
        )
    if y.dtype not in _FLOATS:
        raise TypeError(f"y must be float16, bfloat16, float32 or float64, got {y.dtype}")
    batch, channels, height, width = y.shape
    for name, tensor, shape in (
        ("z", z, (batch, height, width, channels)),
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for y of shape {tuple(y.shape)}, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if (tensor.dtype == torch.float64) != (y.dtype == torch.float64):
            raise TypeError(f"{name} must be float64 exactly if y is, got {tensor.dtype} with {y.dtype}")
        if tensor.device != y.device:
            raise ValueError(f"{name} is on {tensor.device} but y is on {y.device}")
    if z.dtype != y.dtype:
        raise TypeError(f"z must be {y.dtype} as y is, got {z.dtype}")


def check_grad(grad: Tensor, z: Tensor) -> None:
    """Raise a ValueError if the gradient of the result, which is like z, does not fit."""
    if grad.shape != z.shape or grad.dtype != z.dtype or grad.device != z.device:
        raise ValueError(
            f"grad must be {tuple(z.shape)}, {z.dtype} on {z.device}, "
            f"got {tuple(grad.shape)}, {grad.dtype} on {grad.device}"
        )


def computed_dtype(y: Tensor) -> torch.dtype:
    """The dtype of the computation. Results are then rounded to y's dtype."""
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def norm_gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`selective_scan.norm_gate` without its gradient."""
    check_inputs(y, z, weight, bias)
    dtype = computed_dtype(y)
    tokens = y.permute(0, 2, 3, 1).to(dtype)
    affine = F.layer_norm(tokens, tokens.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return (affine * F.silu(z.to(dtype))).to(y.dtype).contiguous()


def norm_gate_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `norm_gate` for y, z, weight and bias, from `grad` of its result. The norm is recomputed."""
    check_inputs(y, z, weight, bias)
    check_grad(grad, z)
    dtype = computed_dtype(y)
    tokens = y.permute(0, 2, 3, 1).to(dtype).contiguous()
    wide = grad.to(dtype), z.to(dtype), weight.to(dtype), bias.to(dtype)  # in the dtype of the computation
    grad_wide, z_wide, weight_wide, bias_wide = wide
    shape = tokens.shape[-1:]
    affine, mean, rstd = torch.native_layer_norm(tokens, shape, weight_wide, bias_wide, eps)
    sigmoid = torch.sigmoid(z_wide)
    grad_z = grad_wide * affine * (sigmoid * (1 + z_wide * (1 - sigmoid)))
    grad_y, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_wide * (z_wide * sigmoid), tokens, shape, mean, rstd, weight_wide, bias_wide, [True, True, True]
    )
    grad_y = grad_y.permute(0, 3, 1, 2).to(y.dtype).contiguous()
    return grad_y, grad_z.to(z.dtype).contiguous(), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
