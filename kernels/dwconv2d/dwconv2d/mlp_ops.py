"""The operator `dwconv2d::mlp`: two linear layers with GELU between them.

One Triton kernel runs it if `mlp_triton.has_kernel` is true. For other tensors on a GPU, `mlp_triton.mlp` calls
PyTorch's layers; on other devices, `mlp_reference.mlp` runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dwconv2d import loading
from dwconv2d import mlp_reference as reference

_INPUTS = "Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias"
torch.library.define("dwconv2d::mlp", f"({_INPUTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
loading.register(reference.mlp, triton_module="mlp_triton", has_compiled_kernels=False)


@torch.library.register_fake("dwconv2d::mlp")
def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    reference.check_inputs(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return x.new_empty((*x.shape[:-1], fc2_weight.shape[0]))


def _setup_context(ctx, inputs, output):
    *saved, fc2_bias = inputs
    ctx.fc2_bias_dtype = fc2_bias.dtype
    ctx.save_for_backward(*saved)


def _backward(ctx, grad):
    """PyTorch's own operators, as for separate layers. The hidden values are computed again, not saved."""
    x, fc1_weight, fc1_bias, fc2_weight = ctx.saved_tensors
    needs_x, needs_fc1, needs_fc1_bias, needs_fc2, needs_fc2_bias = ctx.needs_input_grad
    hidden = F.linear(x, fc1_weight, fc1_bias.to(x.dtype))
    grad_hidden = torch.ops.aten.gelu_backward(grad @ fc2_weight, hidden)
    rows, grad_rows, grad_hidden_rows = (t.flatten(0, -2) for t in (x, grad, grad_hidden))
    return (
        grad_hidden @ fc1_weight if needs_x else None,
        grad_hidden_rows.t() @ rows if needs_fc1 else None,
        grad_hidden_rows.sum(0).to(fc1_bias.dtype) if needs_fc1_bias else None,
        grad_rows.t() @ F.gelu(hidden).flatten(0, -2) if needs_fc2 else None,
        grad_rows.sum(0).to(ctx.fc2_bias_dtype) if needs_fc2_bias else None,
    )


loading.register_autograd("mlp", _backward, _setup_context)


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Linear layer, GELU, linear layer: y = fc2_weight gelu(fc1_weight x + fc1_bias) + fc2_bias.

    GELU is the exact one, by the error function. On a GPU from sm_80 on, in float16 or bfloat16 and with at most 128
    channels in x and in y, one kernel computes y and keeps the hidden values out of the GPU's memory. Otherwise, a GPU
    runs PyTorch's layers, which store them. Hidden values are rounded to x's dtype between GELU and the second layer,
    as separate layers round them; sums are float32 (float64 for float64). The backward pass computes the hidden values
    again, so only the inputs are saved.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64. A GPU copies it if its rows are not evenly spaced in memory.
        fc1_weight, fc1_bias: (H, C) of x's dtype, and (H,) of any floating dtype, float64 if and only if x is.
        fc2_weight, fc2_bias: (C_out, H) and (C_out,); the same rule holds for their dtypes.

    Returns:
        y, (..., C_out), contiguous, x's dtype. Under autocast, x and the weights are cast to the autocast dtype first.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a type or dtype does not fit; the message names the argument.
        NotImplementedError: an input has a tangent of forward-mode differentiation.
    """
    loading.check_tensors(x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias)
    if (cast_to := loading.autocast_dtype(x)) is not None:
        x, fc1_weight, fc2_weight = (loading.cast(t, cast_to) for t in (x, fc1_weight, fc2_weight))
    return loading.call("mlp", x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
