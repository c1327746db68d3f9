"""FLOPs by fvcore's counter, a multiply-add as one, with the custom operators counted.

Counted are convolutions, linear layers, norms and the operators below; activations and sums are not, as in the paper.
"""

import copy
import logging
from math import prod

import torch
from fvcore.nn import FlopCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import get_shape
from torch import nn

SCAN_FLOPS = 7  # for each state: B L D N of them
FUSION_TAPS = 27  # three 3x3 convolutions for each state


def _scan_flops(inputs: list, outputs: list) -> int:
    return SCAN_FLOPS * prod(get_shape(outputs[0]))


def _fusion_flops(inputs: list, outputs: list) -> int:
    return FUSION_TAPS * prod(get_shape(inputs[0]))


def _conv_flops(inputs: list, outputs: list) -> int:
    _, _, height, width = get_shape(inputs[1])
    return height * width * prod(get_shape(outputs[0]))


HANDLES = {
    "selective_scan::selective_scan_state": _scan_flops,
    "dwconv2d::state_fusion": _fusion_flops,
    "dwconv2d::state_fusion_output": _fusion_flops,
    "dwconv2d::dilated_dwconv2d": _conv_flops,
}


def count_flops(model: nn.Module, size: tuple[int, int] = (224, 224)) -> FlopCountAnalysis:
    """FLOPs of one image of `size` (height, width), in the model's present mode. `.total()` and `.by_module()` tell.

    Training mode counts 5 instead of 2 operations an element for batch norm; the published figures do.
    """
    model = copy.deepcopy(model)  # a pass in training mode updates batch norm
    weight = next(model.parameters())
    return analyse(model, torch.zeros(1, model.in_chans, *size, device=weight.device, dtype=weight.dtype))


def analyse(model: nn.Module, images: torch.Tensor) -> FlopCountAnalysis:
    """fvcore's count of a forward pass of any model that may hold our operators."""
    analysis = FlopCountAnalysis(model, images).set_op_handle(**HANDLES)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)  # it lists every activation as unsupported
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def flops_table(model: nn.Module, size: tuple[int, int] = (224, 224)) -> str:
    """Parameters and FLOPs by layer as a Markdown table."""
    return flop_count_table(count_flops(model, size), max_depth=3)
