"""The operator `selective_scan::selective_scan_state`: schema, kernels, fake kernel, autograd.

PyTorch's dispatcher chooses among three kernels: the compiled one, which csrc/cpu/scan.cpp or csrc/cuda/scan.cpp
registers, Triton's of scan_triton.py, and plain PyTorch's of scan_reference.py.
"""

import torch
from torch import Tensor

from selective_scan import loading
from selective_scan import scan_reference as reference

FORWARD = "selective_scan::selective_scan_state"
BACKWARD = "selective_scan::selective_scan_state_backward"
_OPTIONS = "Tensor? delta_bias=None, bool delta_softplus=False, bool A_is_log=False"
_INPUTS = f"Tensor u, Tensor delta, Tensor A, Tensor B, {_OPTIONS}"

torch.library.define(FORWARD, f"({_INPUTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    BACKWARD,
    f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
for plain in (reference.selective_scan_state, reference.selective_scan_state_backward):
    loading.register(plain, triton_module="scan_triton", has_compiled_kernels=True)


@torch.library.register_fake(FORWARD)
def _forward_fake(u, delta, A, B, delta_bias=None, delta_softplus=False, A_is_log=False):
    reference.check_inputs(u, delta, A, B, delta_bias)
    batch, channels, length = u.shape
    return u.new_empty((batch, channels, A.shape[1], length), dtype=reference.state_dtype(u))


@torch.library.register_fake(BACKWARD)
def _backward_fake(grad, u, delta, A, B, delta_bias=None, delta_softplus=False, A_is_log=False):
    reference.check_inputs(u, delta, A, B, delta_bias)
    reference.check_grad(grad, u, A)
    activations = torch.empty_like(u), torch.empty_like(delta)
    return (*activations, A.new_empty(A.shape), B.new_empty(B.shape), A.new_empty(A.shape[:1]))


# csrc/autograd.cpp has the same functions, and takes precedence where it is compiled: change both.
def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.A_is_log = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    inputs = ctx.saved_tensors  # read only once: under gradient checkpointing, a second read is an error
    grads = loading.call("selective_scan_state_backward", grad, *inputs, ctx.delta_softplus, ctx.A_is_log)
    return (*grads[:4], None if inputs[-1] is None else grads[4], None, None)


loading.register_autograd("selective_scan_state", _backward, _setup_context)
loading.refuse_second_derivatives("selective_scan_state")


def selective_scan_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    A_is_log: bool = False,
) -> Tensor:
    """States of a diagonal selective state space model, scanned along the last dimension.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t with h_{-1} = 0 and dt = delta + delta_bias. With `delta_softplus`, dt is
    the softplus of this sum. This is the state transition of Mamba (arXiv 2312.00752, equation 2a) and Spatial-Mamba
    (arXiv 2410.15091), with A discretised by zero-order hold and B by Euler's rule. The operator returns the states h,
    not y = C h.

    Args:
        u: input, (B, D, L), float16, bfloat16, float32 or float64.
        delta: step size, (B, D, L), u's dtype.
        A: decay rates, (D, N), negative for a stable scan; float32 (float64 if u is).
        B: input matrix, (B, N, L) shared by all channels, or (B, G, N, L) shared within G equal groups of
            consecutive channels; u's dtype.
        delta_bias: added to delta, (D,), A's dtype.
        delta_softplus: apply softplus to the biased delta.
        A_is_log: the argument holds log(-A), as the models store it; its gradient is the gradient for log(-A).

    Returns:
        h, (B, D, N, L), contiguous, float32 (float64 if u is), whatever the inputs' 16-bit type. Gradients have
        their input's dtype. Those for u and delta also have its memory format.

    The result is defined for finite inputs and dt A <= 0. After an infinity it is undefined, and states that grow may
    overflow. Under autocast, u, delta and B are cast to the autocast dtype, and A and delta_bias to float32.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: a type or dtype does not fit; the message names the argument.
        NotImplementedError: an input has a tangent of forward-mode differentiation.
    """
    loading.check_tensors(u=u, delta=delta, A=A, B=B, **({} if delta_bias is None else {"delta_bias": delta_bias}))
    if (cast_to := loading.autocast_dtype(u)) is not None:
        u, delta, B = (loading.cast(t, cast_to) for t in (u, delta, B))
        A = loading.cast(A, torch.float32)
        delta_bias = None if delta_bias is None else loading.cast(delta_bias, torch.float32)
    return loading.call("selective_scan_state", u, delta, A, B, delta_bias, delta_softplus, A_is_log)
