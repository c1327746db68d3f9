"""FLOPs of the operators, registered with `torch.utils.flop_counter` for `FlopCounterMode`.

A multiply-add counts as two, as in PyTorch's own formulas. Normalisations, activations and gates do not count.
"""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from selective_scan import gate_ops, scan_ops  # noqa: F401, they define the operators

# The official counters of Mamba and of Spatial-Mamba use this number.
MULTIPLY_ADDS_PER_STATE = 7
MULTIPLY_ADDS_PER_STATE_BACKWARD = (
    2 * MULTIPLY_ADDS_PER_STATE + 4
)  # the states again, their adjoint, and the products of the four gradients


def scan_multiply_adds(u_shape, delta_shape, A_shape, *args) -> int:
    """`MULTIPLY_ADDS_PER_STATE` for each of the B D N L states."""
    return MULTIPLY_ADDS_PER_STATE * prod(u_shape) * A_shape[1]


@register_flop_formula(torch.ops.selective_scan.selective_scan_state)
def _forward(*shapes, out_shape=None, **kwargs) -> int:
    return 2 * scan_multiply_adds(*shapes)


@register_flop_formula(torch.ops.selective_scan.selective_scan_state_backward)
def _backward(grad_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * MULTIPLY_ADDS_PER_STATE_BACKWARD * prod(grad_shape)
