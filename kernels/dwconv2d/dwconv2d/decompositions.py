"""The operators on planes in terms of PyTorch's standard operators, so that exported programs run without this package.

table = torch.export.default_decompositions()
table.update(dwconv2d.decompositions())
program = torch.export.export(model, (images,)).run_decompositions(table)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dwconv2d.plane_reference import DILATIONS, check_conv_inputs, check_output_inputs


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Tensor]]:
    """Decompositions for `torch.export.ExportedProgram.run_decompositions`.

    The table has the forward operators on planes. The operators on tokens and `mlp` have no decomposition: a model that
    is exported calls PyTorch's layers in their place.
    """
    return {
        torch.ops.dwconv2d.dilated_dwconv2d.default: _dilated_dwconv2d,
        torch.ops.dwconv2d.state_fusion.default: _state_fusion,
        torch.ops.dwconv2d.state_fusion_output.default: _state_fusion_output,
    }


def _dilated_dwconv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, padding_mode: str = "replicate"
) -> Tensor:
    check_conv_inputs(x, weight, bias, dilation, padding_mode)
    rows, columns = (dilation * (k // 2) for k in weight.shape[2:])
    if padding_mode == "replicate":
        x, rows, columns = F.pad(x, (columns, columns, rows, rows), mode="replicate"), 0, 0
    return F.conv2d(x, weight, bias, padding=(rows, columns), dilation=dilation, groups=weight.shape[0])


def _state_fusion(h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor) -> Tensor:
    planes = h if h.dim() == 4 else h.transpose(1, 2).flatten(0, 1)
    weights = (weight3, weight3_d3, weight3_d5)
    fused = sum(
        _dilated_dwconv2d(planes, a * weight, dilation=dilation)
        for weight, a, dilation in zip(weights, alpha.unbind(), DILATIONS, strict=True)
    )
    return fused if h.dim() == 4 else fused.unflatten(0, (h.shape[0], h.shape[2])).transpose(1, 2)


def _state_fusion_output(
    h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor, C: Tensor, D: Tensor, x: Tensor
) -> Tensor:
    check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x)
    fused = _state_fusion(h, weight3, weight3_d3, weight3_d5, alpha)
    fused = fused if h.dim() == 5 else fused.unsqueeze(2)
    terms = fused * C.to(h.dtype).unsqueeze(1)
    # A single state needs no sum, but runtimes would compute one.
    y = (terms.squeeze(2) if h.shape[2:-2] in ((), (1,)) else terms.sum(2)) + D[:, None, None] * x.to(h.dtype)
    return y.to(x.dtype)
