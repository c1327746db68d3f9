"""The operator `selective_scan::norm_gate`, which normalises and gates the scan's planes and returns tokens.

On a GPU, Triton's kernels run it; elsewhere, plain PyTorch does.
"""

import torch
from torch import Tensor

from selective_scan import gate_reference as reference
from selective_scan import loading

_INPUTS = "Tensor y, Tensor z, Tensor weight, Tensor bias, float eps"
_SCHEMAS = {
    "norm_gate": f"({_INPUTS}) -> Tensor",
    "norm_gate_backward": f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"selective_scan::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
    loading.register(getattr(reference, _name), triton_module="gate_triton", has_compiled_kernels=False)


@torch.library.register_fake("selective_scan::norm_gate")
def _forward_fake(y, z, weight, bias, eps):
    reference.check_inputs(y, z, weight, bias)
    return z.new_empty(z.shape)


@torch.library.register_fake("selective_scan::norm_gate_backward")
def _backward_fake(grad, y, z, weight, bias, eps):
    reference.check_inputs(y, z, weight, bias)
    reference.check_grad(grad, z)
    return tuple(t.new_empty(t.shape) for t in (y, z, weight, bias))


# csrc/autograd.cpp has the same functions, and takes precedence where it is compiled: change both.
def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *loading.call("norm_gate_backward", grad, *ctx.saved_tensors, ctx.eps), None


loading.register_autograd("norm_gate", _backward, _setup_context)
loading.refuse_second_derivatives("norm_gate")


def norm_gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the channels of planes, times SiLU of a gate, as tokens: LayerNorm(y) z sigmoid(z).

    Mamba (arXiv 2312.00752) and Spatial-Mamba (arXiv 2410.15091) apply it to the result of their scan. It computes in
    float32 (float64 for float64) and rounds once. The backward pass recomputes the norm, so only the inputs are saved.

    Args:
        y: planes, (B, D, H, W), float16, bfloat16, float32 or float64.
        z: tokens, (B, H, W, D), y's dtype; a view such as `projection.chunk(2, -1)[1]` is read without a copy.
        weight, bias: the norm's parameters, (D,), of any floating dtype, float64 if and only if y is.
        eps: added to the variance.

    Returns:
        tokens (B, H, W, D), contiguous, y's dtype. Under autocast, y and z are cast to the autocast dtype first. On
        a GPU, y or z is copied if its positions are not evenly spaced in memory, as in a crop.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a type or dtype does not fit; the message names the argument.
        NotImplementedError: an input has a tangent of forward-mode differentiation.
    """
    loading.check_tensors(y=y, z=z, weight=weight, bias=bias)
    if (cast_to := loading.autocast_dtype(y)) is not None:
        y, z = loading.cast(y, cast_to), loading.cast(z, cast_to)
    return loading.call("norm_gate", y, z, weight, bias, eps)
