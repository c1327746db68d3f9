"""The two linear layers in plain PyTorch: the specification, and what runs on devices other than a GPU."""

import torch.nn.functional as F
from torch import Tensor

from dwconv2d.token_reference import FLOATS, check_parameter, computed_dtype


def check_inputs(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> None:
    """Raise a ValueError or TypeError that names the first argument that does not fit the others."""
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., channels) with at least two dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"{name} must be (channels out, channels in), got shape {tuple(weight.shape)}")
        if weight.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {weight.dtype}")
    hidden, results = fc1_weight.shape[0], fc2_weight.shape[0]
    check_parameter(x, "fc1_weight", fc1_weight, (hidden, x.shape[-1]))
    check_parameter(x, "fc1_bias", fc1_bias, (hidden,))
    check_parameter(x, "fc2_weight", fc2_weight, (results, hidden))
    check_parameter(x, "fc2_bias", fc2_bias, (results,))


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """`dwconv2d.mlp` without its gradient."""
    check_inputs(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    dtype = computed_dtype(x)
    hidden = F.gelu(F.linear(x.to(dtype), fc1_weight.to(dtype), fc1_bias.to(dtype))).to(x.dtype)
    return F.linear(hidden.to(dtype), fc2_weight.to(dtype), fc2_bias.to(dtype)).to(x.dtype).contiguous()
