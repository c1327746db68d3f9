"""The state scan and its gradients in Triton, for GPUs without a compiled kernel.

One program owns a tile of channels of one image. It walks along L in chunks, in order, and carries the state of each
channel from chunk to chunk. Inside a chunk, `tl.associative_scan` composes the steps. A step h -> a h + b is kept as
(a - 1, b). With slow decays, a within 1e-3 of 1, the product of a thousand rounded a's would lose four digits; a - 1
keeps them all. Only products of decays appear, never a quotient, so decays that underflow to zero are harmless.

The backward pass recomputes the states with the forward kernel, then walks along L from the other end. It loads every
chunk in reversed order instead of scanning in reverse, because Triton's reverse scan had a bug
(triton-lang/triton#4362). Triton does not see that a reversed order is contiguous, and lets the lanes of a warp run
along the first axis of the tile. So the first axis is L, in both kernels.

The kernels store partial sums over images and over the tiles that share a B, and PyTorch adds them in a fixed order.
There are no atomics, so results repeat to the bit. Everything is computed in the states' dtype and rounded once, when
it is stored.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_scan import scan_reference as reference

# Numbers that differ from call to call. A kernel that is compiled for one value would not be faster.
_SIZES = ["L", "group_channels", "group_tiles", "groups"]


# ----- functions of a tile


@triton.jit
def _constant(value: tl.constexpr, like):
    """A scalar in the dtype of `like`. A plain literal could lose digits, because it may pass through float32."""
    return tl.full((), value, like.dtype)


@triton.jit
def _exp_expm1(x):
    """exp(x) and exp(x) - 1, each to a few units in its last place.

    Triton's own exp is 2^(x log2(e)), whose relative error in float32 grows with |x|. Triton has no expm1. Results
    within half an octave of the ends of the range of normal numbers may already be zero or infinite.
    """
    double: tl.constexpr = x.dtype == tl.float64
    # Beyond these limits, exp is 0 or infinity. The limits make the power of two below fit its bits.
    lowest: tl.constexpr = -746.0 if double else -104.0
    highest: tl.constexpr = 710.0 if double else 89.0
    x = tl.where(x < lowest, lowest, x)
    x = tl.where(x > highest, highest, x)

    # x = k log(2) + r with |r| <= log(2) / 2. The first part of log(2), 355/512, has few digits: k times it is exact.
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693359375) - k * _constant(-0.00021219444005469058277, x)

    # exp(r) = 1 + r (1 + r/2 (1 + r/3 (...))), from the inside
    order: tl.constexpr = 13 if double else 7
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(order - 1):
        series = 1 + series * (r * _constant(1 / (order - i), x))
    series *= r

    if double:
        power = (tl.maximum(k.to(tl.int64) + 1023, 0) << 52).to(tl.float64, bitcast=True)
    else:
        power = (tl.maximum(k.to(tl.int32) + 127, 0) << 23).to(tl.float32, bitcast=True)
    exp = power * (1 + series)
    return exp, tl.where(k == 0, series, exp - 1)


@triton.jit
def _exp(x):
    return _exp_expm1(x)[0]


@triton.jit
def _expm1(x):
    return _exp_expm1(x)[1]


@triton.jit
def _softplus_sigmoid(s):
    """log(1 + exp(s)) and its derivative, both with a small relative error for every s."""
    y = _exp(-tl.abs(s))
    # log(1 + y) = 2 artanh(z) = 2 z (1 + z^2/3 + z^4/5 + ...), with z <= 1/3
    z = y / (2 + y)
    terms: tl.constexpr = 16 if s.dtype == tl.float64 else 7
    series = tl.zeros(s.shape, s.dtype)
    for i in tl.static_range(terms):
        series = series * (z * z) + _constant(1 / (2 * (terms - i) - 1), s)
    return tl.where(s > 0, s, 0) + 2 * z * series, tl.where(s > 0, 1, y) / (1 + y)


@triton.jit
def _compose(m1_first, b_first, m1_then, b_then):
    """Compose two steps h -> (1 + m1) h + b, with m1 the decay minus one, without adding 1 to m1, which rounds m1."""
    return m1_first + (m1_then + m1_then * m1_first), b_then + (b_first + m1_then * b_first)


@triton.jit
def _scan(decay_m1, b, carry):
    """States after every step of a chunk, along the first axis. `carry` is each channel's state before the chunk."""
    decay_m1, b = tl.associative_scan((decay_m1, b), 0, _compose)
    return b + (carry[None, :] + decay_m1 * carry[None, :])


@triton.jit
def _row(tile, index):
    return tl.sum(tl.where(tl.arange(0, tile.shape[0])[:, None] == index, tile, 0), axis=0)


@triton.jit
def _with_row(tile, index, row):
    return tl.where(tl.arange(0, tile.shape[0])[:, None] == index, row[None, :], tile)


# ----- memory


@triton.jit
def _channels(group_channels, group_tiles, groups, BLOCK_D: tl.constexpr):
    """This program's image, group, tile number in the image, channels, and which of these belong to the group.

    Numbers that are multiplied by a stride have 64 bits, because tensors may have more than 2^31 elements.
    """
    tile = tl.program_id(0) % (group_tiles * groups)
    image = (tl.program_id(0) // (group_tiles * groups)).to(tl.int64)
    group = tile // group_tiles
    member = (tile % group_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    d = (group * group_channels + member).to(tl.int64)
    return image, group.to(tl.int64), tile, d, member < group_channels


@triton.jit
def _load(ptrs, t, stride_t, valid, dtype: tl.constexpr):
    """A tile (positions, channels) from pointers to the channels, zero where not valid."""
    return tl.load(ptrs[None, :] + (t * stride_t)[:, None], mask=valid, other=0).to(dtype)


@triton.jit
def _store(ptrs, t, valid, tile):
    tl.store(ptrs[None, :] + t[:, None], tile, mask=valid)


@triton.jit
def _load_bias(bias_ptr, d, valid, dtype: tl.constexpr):
    bias = tl.zeros(d.shape, dtype)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d, mask=valid, other=0)
    return bias


@triton.jit
def _load_rate(A_ptr, d, n, valid, N: tl.constexpr, IS_LOG: tl.constexpr):
    """Load A of each channel; if the tensor holds log(-A), compute A = -exp(log(-A))."""
    A = tl.load(A_ptr + d * N + n, mask=valid, other=0)
    if IS_LOG:
        A = -_exp(A)
    return A


@triton.jit
def _load_step_size(delta_ptrs, t, stride_t, bias, valid, dtype: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Delta after bias and softplus, zero where not valid, and its derivative."""
    s = _load(delta_ptrs, t, stride_t, valid, dtype) + bias[None, :]
    slope = tl.full(s.shape, 1.0, dtype)
    if SOFTPLUS:
        s, slope = _softplus_sigmoid(s)
    return tl.where(valid, s, 0), slope


# ----- kernels


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    h_ptr,
    L,
    group_channels,
    group_tiles,
    groups,
    u_stride_b,
    u_stride_d,
    u_stride_l,
    delta_stride_b,
    delta_stride_d,
    delta_stride_l,
    B_stride_b,
    B_stride_g,
    B_stride_n,
    B_stride_l,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """h_t = a_t h_{t-1} + dt_t B_t u_t with a_t = exp(dt_t A)."""
    dtype: tl.constexpr = A_ptr.dtype.element_ty
    image, group, _tile, d, d_valid = _channels(group_channels, group_tiles, groups, BLOCK_D)
    u_ptrs = u_ptr + image * u_stride_b + d * u_stride_d
    delta_ptrs = delta_ptr + image * delta_stride_b + d * delta_stride_d
    B_group_ptr = B_ptr + image * B_stride_b + group * B_stride_g
    bias = _load_bias(bias_ptr, d, d_valid, dtype)
    channel = image * groups * group_channels + d

    carries = tl.zeros((BLOCK_N, BLOCK_D), dtype)
    start = 0
    while start < L:
        t = (start + tl.arange(0, BLOCK_L)).to(tl.int64)
        valid = (t < L)[:, None] & d_valid[None, :]
        u = _load(u_ptrs, t, u_stride_l, valid, dtype)
        dt, _slope = _load_step_size(delta_ptrs, t, delta_stride_l, bias, valid, dtype, SOFTPLUS)
        for n in range(N):
            A = _load_rate(A_ptr, d, n, d_valid, N, A_IS_LOG)
            B_ptrs = B_group_ptr + tl.cast(n, tl.int64) * B_stride_n + t * B_stride_l
            B = tl.load(B_ptrs, mask=t < L, other=0).to(dtype)
            # Beyond the end, dt is 0. So the last row holds the state after the last valid step.
            decay_m1 = _expm1(dt * A[None, :])
            h = _scan(decay_m1, dt * u * B[:, None], _row(carries, n))
            _store(h_ptr + (channel * N + n) * L, t, valid, h)
            carries = _with_row(carries, n, _row(h, BLOCK_L - 1))
        start += BLOCK_L


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    grad_ptr,
    h_ptr,
    grad_u_ptr,
    grad_delta_ptr,
    grad_A_ptr,
    grad_B_ptr,
    grad_bias_ptr,
    L,
    group_channels,
    group_tiles,
    groups,
    u_stride_b,
    u_stride_d,
    u_stride_l,
    delta_stride_b,
    delta_stride_d,
    delta_stride_l,
    B_stride_b,
    B_stride_g,
    B_stride_n,
    B_stride_l,
    grad_stride_b,
    grad_stride_d,
    grad_stride_n,
    grad_stride_l,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    A_IS_LOG: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The gradient that reaches each state is a scan from the other end: lam_t = grad_t + a_{t+1} lam_{t+1}."""
    dtype: tl.constexpr = A_ptr.dtype.element_ty
    image, group, tile, d, d_valid = _channels(group_channels, group_tiles, groups, BLOCK_D)
    grad_ptrs = grad_ptr + image * grad_stride_b + d * grad_stride_d
    u_ptrs = u_ptr + image * u_stride_b + d * u_stride_d
    delta_ptrs = delta_ptr + image * delta_stride_b + d * delta_stride_d
    B_group_ptr = B_ptr + image * B_stride_b + group * B_stride_g
    bias = _load_bias(bias_ptr, d, d_valid, dtype)
    channel = image * groups * group_channels + d
    grad_B_row = (image * group_tiles * groups + tile) * N

    carries = tl.zeros((BLOCK_N, BLOCK_D), dtype)
    grad_A = tl.zeros((BLOCK_N, BLOCK_D), dtype)
    grad_bias = tl.zeros((BLOCK_D,), dtype)
    start = 0
    while start < L:
        t = (L - 1 - start - tl.arange(0, BLOCK_L)).to(tl.int64)
        valid = (t >= 0)[:, None] & d_valid[None, :]
        has_next = valid & (t < L - 1)[:, None]
        has_previous = valid & (t > 0)[:, None]
        u = _load(u_ptrs, t, u_stride_l, valid, dtype)
        dt, slope = _load_step_size(delta_ptrs, t, delta_stride_l, bias, valid, dtype, SOFTPLUS)
        dt_next, _slope = _load_step_size(delta_ptrs, t + 1, delta_stride_l, bias, has_next, dtype, SOFTPLUS)
        lam_B = tl.zeros((BLOCK_L, BLOCK_D), dtype)
        lam_A_carried = tl.zeros((BLOCK_L, BLOCK_D), dtype)
        for n in range(N):
            n_64 = tl.cast(n, tl.int64)
            rate = _load_rate(A_ptr, d, n, d_valid, N, A_IS_LOG)
            A = rate[None, :]
            B_ptrs = B_group_ptr + n_64 * B_stride_n + t * B_stride_l
            B = tl.load(B_ptrs, mask=t >= 0, other=0).to(dtype)[:, None]
            grad = _load(grad_ptrs + n_64 * grad_stride_n, t, grad_stride_l, valid, dtype)
            h_previous = _load(h_ptr + (channel * N + n) * L, t - 1, 1, has_previous, dtype)

            next_m1 = _expm1(dt_next * A)
            lam = _scan(next_m1, grad, _row(carries, n))
            carries = _with_row(carries, n, _row(lam, BLOCK_L - 1))

            # a_t h_{t-1} as a product: h_t - drive_t would lose digits by cancellation.
            decay = _exp(dt * A)
            lam_carried = lam * (decay * h_previous)
            lam_B += lam * B
            lam_A_carried += lam_carried * A
            to_A = tl.sum(lam_carried * dt, axis=0)
            if A_IS_LOG:
                to_A *= rate
            grad_A = _with_row(grad_A, n, _row(grad_A, n) + to_A)
            tl.store(grad_B_ptr + (grad_B_row + n) * L + t, tl.sum(lam * (dt * u), axis=1), mask=t >= 0)

        grad_s = (lam_B * u + lam_A_carried) * slope
        grad_bias += tl.sum(grad_s, axis=0)
        _store(grad_u_ptr + channel * L, t, valid, lam_B * dt)
        _store(grad_delta_ptr + channel * L, t, valid, grad_s)
        start += BLOCK_L

    states = tl.arange(0, BLOCK_N)
    _store(grad_A_ptr + channel * N, states, (states < N)[:, None] & d_valid[None, :], grad_A)
    tl.store(grad_bias_ptr + channel, grad_bias, mask=d_valid)


# ----- launches

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # u, delta, A, B, delta_bias


class _Options(NamedTuple):
    softplus: bool
    A_is_log: bool


class _Tiling(NamedTuple):
    """How the channels of an image are divided among programs. A tile lies within one group."""

    groups: int
    group_channels: int
    group_tiles: int
    block_d: int
    block_l: int


def _tiling(u: Tensor, B: Tensor) -> _Tiling:
    """Tiles of up to 512 elements for one warp: scans and sums then need neither shared memory nor barriers.

    8 channels and 64 positions were chosen from the compiled code for sm_80 and sm_90, not from timings. With more
    channels, the backward kernel spills far more registers. With fewer, programs would use even less of the 32 bytes
    that a GPU reads at once if u is channels-last. Smaller groups leave room for more positions.
    """
    _, channels, length = u.shape
    groups = 1 if B.dim() == 3 else B.shape[1]
    block_d = min(triton.next_power_of_2(channels // groups), 8)
    block_l = max(min(triton.next_power_of_2(length), 512 // block_d), 32)
    return _Tiling(groups, channels // groups, triton.cdiv(channels // groups, block_d), block_d, block_l)


def _launch(
    kernel: triton.JITFunction,
    tiling: _Tiling,
    inputs: _Inputs,
    others: tuple[Tensor, ...],
    options: _Options,
    strides: tuple[int, ...] = (),
) -> None:
    """Launch `kernel` with the operator's inputs and then `others`. `strides` are those of the first of `others`."""
    u, delta, A, B, delta_bias = inputs
    if u.shape[0] == 0:
        return
    grouped = B.unsqueeze(1) if B.dim() == 3 else B
    states = A.shape[1]
    with torch.cuda.device_of(u):
        kernel[(u.shape[0] * tiling.groups * tiling.group_tiles,)](
            *(u, delta, A.contiguous(), B, None if delta_bias is None else delta_bias.contiguous(), *others),
            *(u.shape[2], tiling.group_channels, tiling.group_tiles, tiling.groups),
            *(*u.stride(), *delta.stride(), *grouped.stride(), *strides),
            N=states,
            SOFTPLUS=options.softplus,
            A_IS_LOG=options.A_is_log,
            BLOCK_D=tiling.block_d,
            BLOCK_N=max(triton.next_power_of_2(states), 2),  # Triton 3.0 crashes on a sum over one row
            BLOCK_L=tiling.block_l,
            num_warps=1,
        )


def _states(inputs: _Inputs, options: _Options, tiling: _Tiling) -> Tensor:
    u, _, A, _, _ = inputs
    batch, channels, length = u.shape
    h = A.new_empty(batch, channels, A.shape[1], length)
    _launch(_forward_kernel, tiling, inputs, (h,), options)
    return h


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
    reference.check_inputs(u, delta, A, B, delta_bias)
    return _states((u, delta, A, B, delta_bias), _Options(delta_softplus, A_is_log), _tiling(u, B))


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
    """Gradients of `selective_scan_state` for u, delta, A, B and delta_bias, from `grad` of the states (B, D, N, L)."""
    reference.check_inputs(u, delta, A, B, delta_bias)
    reference.check_grad(grad, u, A)
    inputs, options, tiling = (u, delta, A, B, delta_bias), _Options(delta_softplus, A_is_log), _tiling(u, B)
    h = _states(inputs, options, tiling)
    batch, channels, states, length = h.shape
    # In tests on a CPU, Triton's interpreter truncates to bfloat16 instead of rounding, so PyTorch does the cast there.
    activation = u.dtype if u.is_cuda else A.dtype

    grad_u, grad_delta = h.new_empty(u.shape, dtype=activation), h.new_empty(u.shape, dtype=activation)
    grad_A, grad_bias = h.new_empty(batch, channels, states), h.new_empty(batch, channels)
    partial_B = (batch, tiling.groups, tiling.group_tiles, states, length)
    grad_B = h.new_empty(partial_B, dtype=activation if tiling.group_tiles == 1 else A.dtype)
    others = (grad, h, grad_u, grad_delta, grad_A, grad_B, grad_bias)
    _launch(_backward_kernel, tiling, inputs, others, options, grad.stride())

    if tiling.group_tiles > 1:
        grad_B = grad_B.sum(2)
    return (
        reference.laid_out_as(grad_u, u),
        reference.laid_out_as(grad_delta, delta),
        grad_A.sum(0),
        grad_B.view(B.shape).to(B.dtype),
        grad_bias.sum(0),
    )
