"""Count FLOPs with fvcore, including the custom operators; a multiply-add counts as one.

Convolutions, linear layers, norms and the operators below count; activations and sums do not, as in the paper.
"""

import copy
import logging

import torch
from dwconv2d.flops import conv_multiply_adds, fusion_multiply_adds
from fvcore.nn import FlopCountAnalysis, flop_count_table
from fvcore.nn.jit_handles import get_shape
from selective_scan.flops import scan_multiply_adds
from torch import nn


def _shapes(inputs: list) -> list:
    return [get_shape(value) for value in inputs]


HANDLES = {
    "selective_scan::selective_scan_state": lambda inputs, outputs: scan_multiply_adds(*_shapes(inputs[:3])),
    "dwconv2d::state_fusion": lambda inputs, outputs: fusion_multiply_adds(get_shape(inputs[0])),
    "dwconv2d::state_fusion_output": lambda inputs, outputs: fusion_multiply_adds(get_shape(inputs[0])),
    "dwconv2d::dilated_dwconv2d": lambda inputs, outputs: conv_multiply_adds(*_shapes(inputs[:2])),
}


def count_flops(model: nn.Module, size: tuple[int, int] = (224, 224)) -> FlopCountAnalysis:
    """Count the FLOPs of one image of `size` (height, width) in the model's present mode.

    Training mode counts 5 instead of 2 operations an element for batch norm; the published figures do so too.

    Returns:
        The analysis; its `.total()` and `.by_module()` give the counts.
    """
    model = copy.deepcopy(model)  # a pass in training mode updates batch norm
    weight = next(model.parameters())
    return analyse(model, torch.zeros(1, model.in_chans, *size, device=weight.device, dtype=weight.dtype))


def analyse(model: nn.Module, images: torch.Tensor) -> FlopCountAnalysis:
    """Return fvcore's count of a forward pass of any model; our operators are counted too."""
    analysis = FlopCountAnalysis(model, images).set_op_handle(**HANDLES)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)  # fvcore lists every activation as unsupported
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def flops_table(model: nn.Module, size: tuple[int, int] = (224, 224)) -> str:
    """Return parameters and FLOPs by layer as a Markdown table."""
    return flop_count_table(count_flops(model, size), max_depth=3)
