"""The state scan in plain PyTorch: the specification, and the kernel for devices without their own.

In shapes, B is the batch, D the channels, N the states and L the tokens. As an argument, B is the input matrix.
"""

import torch
from torch import Tensor


def check_inputs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None) -> None:
    """Raise a ValueError or TypeError that names the first argument that does not fit the others."""
    if u.dim() != 3:
        raise ValueError(f"u must be (batch, channels, length), got shape {tuple(u.shape)}")
    b, d, length = u.shape
    if delta.shape != u.shape:
        raise ValueError(f"delta must have u's shape {tuple(u.shape)}, got {tuple(delta.shape)}")
    if A.dim() != 2 or A.shape[0] != d:
        raise ValueError(f"A must be (channels={d}, states), got shape {tuple(A.shape)}")
    n = A.shape[1]
    if d == 0 or n == 0 or length == 0:
        raise ValueError(f"channels, states and length must be at least 1, got {d}, {n} and {length}")
    if B.dim() not in (3, 4) or (B.shape[0], *B.shape[-2:]) != (b, n, length):
        raise ValueError(
            f"B must be (batch={b}, states={n}, length={length}) or (batch, groups, states, length), "
            f"got shape {tuple(B.shape)}"
        )
    if B.dim() == 4 and (B.shape[1] == 0 or d % B.shape[1]):
        raise ValueError(f"B has {B.shape[1]} groups, which do not divide the {d} channels of u")
    if delta_bias is not None and delta_bias.shape != (d,):
        raise ValueError(f"delta_bias must be (channels={d},), got shape {tuple(delta_bias.shape)}")

    if u.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"u must be float16, bfloat16, float32 or float64, got {u.dtype}")
    state = state_dtype(u)
    _check_dtype_and_device("delta", delta, u.dtype, u)
    _check_dtype_and_device("A", A, state, u)
    _check_dtype_and_device("B", B, u.dtype, u)
    if delta_bias is not None:
        _check_dtype_and_device("delta_bias", delta_bias, state, u)


def check_grad(grad: Tensor, u: Tensor, A: Tensor) -> None:
    """Raise a ValueError or TypeError if the gradient of the states does not fit."""
    shape = (*u.shape[:2], A.shape[1], u.shape[2])
    if grad.shape != shape:
        raise ValueError(f"grad must be {tuple(shape)}, got shape {tuple(grad.shape)}")
    _check_dtype_and_device("grad", grad, state_dtype(u), u)


def _check_dtype_and_device(name: str, tensor: Tensor, dtype: torch.dtype, u: Tensor) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} when u is {u.dtype}, got {tensor.dtype}")
    if tensor.device != u.device:
        raise ValueError(f"{name} is on {tensor.device} but u is on {u.device}")


def state_dtype(u: Tensor) -> torch.dtype:
    """The dtype of the states: float32, or float64 for float64 inputs."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def selective_scan_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    A_is_log: bool = False,
) -> Tensor:
    """`selective_scan.selective_scan_state` without its gradient."""
    check_inputs(u, delta, A, B, delta_bias)
    step_size, _ = _step_size(delta, delta_bias, delta_softplus)
    return _scan(*_discretise(u, step_size, rates(A, A_is_log), B))


def selective_scan_state_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    A_is_log: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `selective_scan_state` for u, delta, A, B and delta_bias, from `grad` of the states (B, D, N, L).

    The states are recomputed, not stored. The gradient that reaches each state is
    lambda_t = grad_t + a_{t+1} lambda_{t+1}. Every gradient is a product of lambda with terms of the forward pass. The
    gradient for delta_bias is returned even if there is no bias.
    """
    check_inputs(u, delta, A, B, delta_bias)
    check_grad(grad, u, A)
    A = rates(A, A_is_log)
    step_size, d_softplus = _step_size(delta, delta_bias, delta_softplus)
    decay_minus_one, drive = _discretise(u, step_size, A, B)

    # a_t h_{t-1} as a product: h_t - drive_t and h_{t-1} + (a_t - 1) h_{t-1} would lose digits by cancellation.
    carried = torch.zeros_like(decay_minus_one)
    carried[..., 1:] = _decay(step_size, A)[..., 1:] * _scan(decay_minus_one.clone(), drive)[..., :-1]

    next_minus_one = torch.zeros_like(decay_minus_one)
    next_minus_one[..., :-1] = decay_minus_one[..., 1:]
    lam = _scan(next_minus_one, grad.clone(memory_format=torch.contiguous_format), reverse=True)

    u_in_dtype = u.to(lam.dtype)
    lam_B = (lam * expand_groups(B, u.shape[1]).to(lam.dtype)).sum(2)
    lam_carried = lam * carried
    grad_u = lam_B * step_size
    grad_delta = (lam_B * u_in_dtype + (lam_carried * A.unsqueeze(-1)).sum(2)) * d_softplus
    grad_A = (lam_carried * step_size.unsqueeze(2)).sum((0, 3)) * (A if A_is_log else 1)
    grad_B = _sum_groups(lam * (step_size.unsqueeze(2) * u_in_dtype.unsqueeze(2)), B)
    grad_bias = grad_delta.sum((0, 2))
    grad_u, grad_delta = laid_out_as(grad_u, u), laid_out_as(grad_delta, delta)
    return grad_u, grad_delta, grad_A.contiguous(), grad_B.to(B.dtype).contiguous(), grad_bias.contiguous()


def laid_out_as(grad: Tensor, activation: Tensor) -> Tensor:
    """A gradient in its activation's dtype and memory format."""
    out = torch.empty_like(activation)
    return grad if grad.dtype == out.dtype and grad.stride() == out.stride() else out.copy_(grad)


def rates(A: Tensor, is_log: bool) -> Tensor:
    """Return the negative decay rates. Their derivative with respect to log(-A) is the rates themselves."""
    return -torch.exp(A) if is_log else A


def _step_size(delta: Tensor, delta_bias: Tensor | None, softplus: bool) -> tuple[Tensor, Tensor]:
    """Delta after bias and softplus, (B, D, L), and its derivative with respect to delta."""
    s = delta.to(state_dtype(delta)).contiguous()
    if delta_bias is not None:
        s = s + delta_bias[:, None]
    if not softplus:
        return s, torch.ones_like(s)
    # Exact for every s. F.softplus is linear from 20 on, which is inexact in float64.
    return s.clamp(min=0) + torch.log1p(torch.exp(-s.abs())), torch.sigmoid(s)


def _discretise(u: Tensor, step_size: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(dt_t A) - 1 and the drive dt_t B_t u_t, both (B, D, N, L) in the states' dtype."""
    dt = step_size.unsqueeze(2)
    decay_minus_one = torch.expm1(dt * A.unsqueeze(-1))
    drive = (dt * u.to(dt.dtype).contiguous().unsqueeze(2)) * expand_groups(B, u.shape[1]).to(dt.dtype)
    return decay_minus_one, drive.contiguous()


def _decay(step_size: Tensor, A: Tensor) -> Tensor:
    """a_t = exp(dt_t A), (B, D, N, L)."""
    return torch.exp(step_size.unsqueeze(2) * A.unsqueeze(-1))


def expand_groups(B: Tensor, channels: int) -> Tensor:
    """B per channel, (B, D, N, L): consecutive channels share a group."""
    grouped = B.unsqueeze(1) if B.dim() == 3 else B
    b, g, n, length = grouped.shape
    return grouped.unsqueeze(2).expand(b, g, channels // g, n, length).reshape(b, channels, n, length)


def _sum_groups(grad: Tensor, B: Tensor) -> Tensor:
    """The adjoint of `expand_groups`, in B's shape."""
    groups = 1 if B.dim() == 3 else B.shape[1]
    b, d, n, length = grad.shape
    return grad.view(b, groups, d // groups, n, length).sum(2).view(B.shape)


def _scan(decay_minus_one: Tensor, drive: Tensor, reverse: bool = False) -> Tensor:
    """h_t = h_{t-1} + decay_minus_one_t h_{t-1} + drive_t along the last dimension, or from its end. Overwrites both.

    The method is doubling (Hillis and Steele, 1986): after k rounds, each position has composed the 2^k steps that end
    there, so ceil(log2 L) vectorised rounds are enough. Only products of decays appear, never a quotient or
    exp(-cumsum), so decays that underflow to zero are harmless. A decay is stored as decay - 1. A decay next to 1 would
    itself lose the digits that matter after thousands of tokens.
    """
    length = drive.shape[-1]
    step = 1
    while step < length:
        late, early = slice(step, None), slice(None, -step)
        if reverse:
            late, early = early, late
        drive[..., late] += drive[..., early] + decay_minus_one[..., late] * drive[..., early]
        decay_minus_one[..., late] += (
            decay_minus_one[..., early] + decay_minus_one[..., late] * decay_minus_one[..., early]
        )
        step *= 2
    return drive
