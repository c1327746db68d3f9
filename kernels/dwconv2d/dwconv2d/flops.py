"""FLOPs of the operators, registered with `torch.utils.flop_counter` for `FlopCounterMode`.

A multiply-add counts as two, as in PyTorch's own formulas. Normalisations, activations and sums do not count.
"""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from dwconv2d import ops, token_ops  # noqa: F401, they define the operators

FUSION_TAPS = 27  # three 3x3 convolutions for each state


def conv_taps(x_shape, weight_shape, *args, **kwargs) -> int:
    """Multiply-adds of a depthwise convolution that keeps the plane's size: one for each tap and element."""
    return prod(weight_shape[2:]) * prod(x_shape)


def fusion_taps(h_shape, *args, **kwargs) -> int:
    """Multiply-adds of a state fusion: `FUSION_TAPS` for each state."""
    return FUSION_TAPS * prod(h_shape)


def _register(operator: torch._ops.OpOverloadPacket, taps, times: int = 1, skipped: int = 0) -> None:
    """Count `times` the multiply-adds of `taps`. The first `skipped` arguments are gradients, which `taps` omits."""

    @register_flop_formula(operator)
    def count(*shapes, out_shape=None, **kwargs) -> int:
        return 2 * times * taps(*shapes[skipped:])


_ops = torch.ops.dwconv2d
_register(_ops.dilated_dwconv2d, conv_taps)
_register(_ops.dilated_dwconv2d_backward, conv_taps, times=2, skipped=1)  # gradients of planes and weight
_register(_ops.state_fusion, fusion_taps)
_register(_ops.state_fusion_backward, fusion_taps, times=2, skipped=1)
_register(_ops.state_fusion_output, fusion_taps)
_register(_ops.state_fusion_output_backward, fusion_taps, times=3, skipped=1)  # and the recomputed states
_register(_ops.depthwise_silu, conv_taps)
_register(_ops.depthwise_silu_backward, conv_taps, times=3, skipped=1)  # and the recomputed convolution
_register(_ops.depthwise_residual_norm, conv_taps)
_register(_ops.depthwise_residual_norm_backward, conv_taps, times=2, skipped=3)
