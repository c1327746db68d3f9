"""FLOPs of the operators, registered with `torch.utils.flop_counter` for `FlopCounterMode`.

A multiply-add counts as two, as in PyTorch's own formulas. Normalisations, activations and sums do not count.
"""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from dwconv2d import mlp_ops, plane_ops, token_ops  # noqa: F401, they define the operators
from dwconv2d.plane_reference import DILATIONS

# Of a 3x3 convolution for each dilation, as the official counters count. The kernels merge the centres and need 25.
MULTIPLY_ADDS_PER_FUSED_STATE = 9 * len(DILATIONS)


def conv_multiply_adds(x_shape, weight_shape, *args, **kwargs) -> int:
    """Multiply-adds of a depthwise convolution that keeps the plane's size: one for each tap and element."""
    return prod(weight_shape[2:]) * prod(x_shape)


def fusion_multiply_adds(h_shape, *args, **kwargs) -> int:
    """Multiply-adds of a state fusion: `MULTIPLY_ADDS_PER_FUSED_STATE` for each state."""
    return MULTIPLY_ADDS_PER_FUSED_STATE * prod(h_shape)


def mlp_multiply_adds(x_shape, fc1_weight_shape, fc1_bias_shape, fc2_weight_shape, *args, **kwargs) -> int:
    """Multiply-adds of two linear layers: one for each weight and row."""
    return prod(x_shape[:-1]) * (prod(fc1_weight_shape) + prod(fc2_weight_shape))


def _register(operator: torch._ops.OpOverloadPacket, multiply_adds, times: int = 1, skipped: int = 0) -> None:
    """Count `times` the `multiply_adds` of the arguments after the first `skipped`."""

    @register_flop_formula(operator)
    def count(*shapes, out_shape=None, **kwargs) -> int:
        return 2 * times * multiply_adds(*shapes[skipped:])


_ops = torch.ops.dwconv2d
_register(_ops.dilated_dwconv2d, conv_multiply_adds)
_register(_ops.dilated_dwconv2d_backward, conv_multiply_adds, times=2, skipped=1)  # gradients of planes and weight
_register(_ops.state_fusion, fusion_multiply_adds)
_register(_ops.state_fusion_backward, fusion_multiply_adds, times=2, skipped=1)
_register(_ops.state_fusion_output, fusion_multiply_adds)
_register(_ops.state_fusion_output_backward, fusion_multiply_adds, times=3, skipped=1)  # and the recomputed states
_register(_ops.depthwise_silu, conv_multiply_adds)
_register(_ops.depthwise_silu_backward, conv_multiply_adds, times=3, skipped=1)  # and the recomputed convolution
_register(_ops.depthwise_residual_norm, conv_multiply_adds)
_register(_ops.depthwise_residual_norm_backward, conv_multiply_adds, times=2, skipped=3)
_register(_ops.mlp, mlp_multiply_adds)
