"""The operators on tokens in Triton, for GPUs: see `token_ops`.

A program owns a tile of positions and channels. Lanes run along the channels, which are adjacent in memory. Each tap of
the 3x3 kernel is one load for the whole tile. Taps of neighbouring positions find their values in the L1 cache. Planes,
(B, D, H, W), are stored and loaded with lanes along positions; Triton exchanges the values through shared memory.

If a second kernel convolves a gradient again, the gradient is stored in float32 (float64 for float64). If it were
rounded to 16 bits in between, results would not be within 1.2 roundings of the exact ones. Programs store partial sums
over positions, and a kernel adds them in a fixed order. There are no atomics, so results repeat to the bit.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwconv2d import token_reference as reference
from dwconv2d.launching import launch

# Numbers that differ from call to call. A kernel that is compiled for one value would not be faster.
_SIZES = ["positions", "height", "width"]


# ----- positions, taps and rounding


@triton.jit
def _image_row_column(p, height, width):
    """Image, row and column of positions that are numbered through all images, as columns (BLOCK_P, 1)."""
    image = p // (height * width)
    inside = p - image * (height * width)
    row = inside // width
    return image.to(tl.int64)[:, None], row[:, None], (inside - row * width)[:, None]


@triton.jit
def _token_ptrs(ptr, image, row, column, d, stride_b, stride_y, stride_x, stride_d):
    """Pointers to the tokens' channels. Offsets have 64 bits, because tensors may have more than 2^31 elements."""
    ptrs = ptr + image * stride_b + row.to(tl.int64) * stride_y + column.to(tl.int64) * stride_x
    return ptrs + d.to(tl.int64) * stride_d


@triton.jit
def _tap(ptrs, valid, row, column, height, width, stride_y, stride_x, DY: tl.constexpr, DX: tl.constexpr, like):
    """The values DY rows and DX columns further on, with zeros outside the plane."""
    y, x = row + DY, column + DX
    inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(ptrs + (DY * stride_y + DX * stride_x), mask=inside, other=0).to(like)


@triton.jit
def _weight(weight_ptr, d, d_valid, tap: tl.constexpr, like):
    return tl.load(weight_ptr + d * 9 + tap, mask=d_valid, other=0).to(like)


@triton.jit
def _convolve(x_ptrs, weight_ptr, bias_ptr, d, d_valid, valid, row, column, height, width, stride_y, stride_x, like):
    """bias + the sum over the nine taps of tap times value."""
    total = tl.load(bias_ptr + d, mask=d_valid, other=0).to(like) + tl.zeros(valid.shape, like)
    for tap in tl.static_range(9):
        value = _tap(x_ptrs, valid, row, column, height, width, stride_y, stride_x, tap // 3 - 1, tap % 3 - 1, like)
        total += _weight(weight_ptr, d, d_valid, tap, like) * value
    return total


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _normalise(x, d_valid, channels, EPS: tl.constexpr):
    """LayerNorm of each position without weight and bias, and the reciprocal of the standard deviation."""
    mean = tl.sum(tl.where(d_valid, x, 0), axis=1)[:, None] / channels
    centred = tl.where(d_valid, x - mean, 0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / channels
    rstd = 1 / tl.sqrt(variance + tl.full((), EPS, x.dtype))
    return centred * rstd, rstd


@triton.jit
def _rounded(x, STORED: tl.constexpr, BY_BITS: tl.constexpr):
    """x as a later load reads it after it was stored as STORED."""
    if BY_BITS and tl.bfloat16 == STORED:  # Triton's interpreter truncates instead of rounding
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        result = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    else:
        result = x.to(STORED).to(x.dtype)
    return result


# ----- depthwise_silu: tokens to planes


@triton.jit(do_not_specialize=["height", "width"])
def _silu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    grad_ptr,
    grad_2_ptr,
    grad_3_ptr,
    grad_c_ptr,
    height,
    width,
    channels,
    plane_units,
    x_stride_b,
    x_stride_y,
    x_stride_x,
    x_stride_d,
    grad_stride_b,
    grad_stride_d,
    grad_stride_p,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With c the convolution: y = SiLU(c) as planes; or, with gradients of y, the gradient of c as tokens in DTYPE."""
    plane = plane_units * UNIT  # the number of positions of a plane; see `_unit`
    d_tiles = tl.cdiv(channels, BLOCK_D)
    p_tiles = tl.cdiv(plane, BLOCK_P)
    d = (tl.program_id(0) % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tile = tl.program_id(0) // d_tiles
    image = (tile // p_tiles).to(tl.int64)
    p = (tile % p_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    row = p // width
    column = p - row * width
    d_valid = d < channels
    valid = (p < plane) & d_valid

    x_ptrs = _token_ptrs(x_ptr, image, row, column, d, x_stride_b, x_stride_y, x_stride_x, x_stride_d)
    c = _convolve(
        x_ptrs, weight_ptr, bias_ptr, d, d_valid, valid, row, column, height, width, x_stride_y, x_stride_x, DTYPE
    )
    gate = _sigmoid(c)
    if grad_ptr is None:
        y_ptrs = y_ptr + image * channels * plane + d.to(tl.int64) * plane + p
        tl.store(y_ptrs, c * gate, mask=valid)
    else:
        offsets = image * grad_stride_b + d.to(tl.int64) * grad_stride_d + p.to(tl.int64) * grad_stride_p
        grad = tl.load(grad_ptr + offsets, mask=valid, other=0).to(DTYPE)
        if grad_2_ptr is not None:
            grad += tl.load(grad_2_ptr + offsets, mask=valid, other=0).to(DTYPE)
        if grad_3_ptr is not None:
            grad += tl.load(grad_3_ptr + offsets, mask=valid, other=0).to(DTYPE)
        grad_c_ptrs = grad_c_ptr + (image * plane + p) * channels + d
        tl.store(grad_c_ptrs, grad * (gate * (1 + c * (1 - gate))), mask=valid)


# ----- depthwise_residual_norm: tokens to tokens


@triton.jit(do_not_specialize=_SIZES)
def _residual_norm_kernel(
    x_ptr,
    update_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    r_ptr,
    n_ptr,
    positions,
    height,
    width,
    channels,
    x_stride_b,
    x_stride_y,
    x_stride_x,
    x_stride_d,
    update_stride_b,
    update_stride_y,
    update_stride_x,
    update_stride_d,
    EPS: tl.constexpr,
    STORED: tl.constexpr,
    BY_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r = s + convolution of s with s = x + scale * update, and n = LayerNorm(r) of the stored r."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    image, row, column = _image_row_column(p, height, width)
    d = tl.arange(0, BLOCK_D)[None, :]
    d_valid = d < channels
    p_valid = (p < positions)[:, None]
    valid = p_valid & d_valid

    x_ptrs = _token_ptrs(x_ptr, image, row, column, d, x_stride_b, x_stride_y, x_stride_x, x_stride_d)
    update_ptrs = update_ptr
    scale = 1.0
    if update_ptr is not None:
        update_ptrs = _token_ptrs(
            update_ptr, image, row, column, d, update_stride_b, update_stride_y, update_stride_x, update_stride_d
        )
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + image, mask=p_valid, other=0).to(DTYPE)
    r = tl.load(bias_ptr + d, mask=d_valid, other=0).to(DTYPE) + tl.zeros(valid.shape, DTYPE)
    # One row of taps at a time: loads of all nine taps from both tensors would need more registers than there are.
    for i in range(3):
        for j in tl.static_range(3):
            y, x = row + (i - 1), column + (j - 1)
            inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            s = tl.load(x_ptrs + ((i - 1) * x_stride_y + (j - 1) * x_stride_x), mask=inside, other=0).to(DTYPE)
            if update_ptr is not None:
                offset = (i - 1) * update_stride_y + (j - 1) * update_stride_x
                s += scale * tl.load(update_ptrs + offset, mask=inside, other=0).to(DTYPE)
            weight = tl.load(weight_ptr + d * 9 + (3 * i + j), mask=d_valid, other=0).to(DTYPE)
            if j == 1:
                weight += tl.where(i == 1, 1, 0)  # the residual
            r += weight * s

    r = _rounded(r, STORED, BY_BITS)
    p_wide = p.to(tl.int64)[:, None]
    tl.store(r_ptr + p_wide * channels + d, r, mask=valid)
    normalised, _rstd = _normalise(r, d_valid, channels, EPS)
    n = normalised * tl.load(norm_weight_ptr + d, mask=d_valid, other=0).to(DTYPE)
    n += tl.load(norm_bias_ptr + d, mask=d_valid, other=0).to(DTYPE)
    tl.store(n_ptr + p_wide * channels + d, n, mask=valid)


@triton.jit(do_not_specialize=["positions"])
def _norm_backward_kernel(
    grad_r_ptr,
    grad_n_ptr,
    r_ptr,
    norm_weight_ptr,
    grad_ptr,
    partials_ptr,
    positions,
    channels,
    grad_r_stride_p,
    grad_r_stride_d,
    grad_n_stride_p,
    grad_n_stride_d,
    EPS: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of r, directly and through n, in DTYPE, and partial sums for the norm's weight and bias."""
    d = tl.arange(0, BLOCK_D)[None, :]
    d_valid = d < channels
    weight = tl.load(norm_weight_ptr + d, mask=d_valid, other=0).to(DTYPE)
    sum_weight = tl.zeros((BLOCK_D,), DTYPE)
    sum_bias = tl.zeros((BLOCK_D,), DTYPE)
    for tile in range(TILES):
        p = ((tl.program_id(0) * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
        valid = (p < positions) & d_valid
        p = p.to(tl.int64)
        r = tl.load(r_ptr + p * channels + d, mask=valid, other=0).to(DTYPE)
        grad_n = tl.load(grad_n_ptr + p * grad_n_stride_p + d.to(tl.int64) * grad_n_stride_d, mask=valid, other=0).to(
            DTYPE
        )
        grad_r = tl.load(grad_r_ptr + p * grad_r_stride_p + d.to(tl.int64) * grad_r_stride_d, mask=valid, other=0).to(
            DTYPE
        )
        normalised, rstd = _normalise(r, d_valid, channels, EPS)
        sum_weight += tl.sum(grad_n * normalised, axis=0)
        sum_bias += tl.sum(grad_n, axis=0)
        grad_n *= weight
        mean = tl.sum(grad_n, axis=1)[:, None] / channels
        along = tl.sum(grad_n * normalised, axis=1)[:, None] / channels
        grad = grad_r + rstd * (grad_n - mean - normalised * along)
        tl.store(grad_ptr + p * channels + d, grad, mask=valid)
    partials_ptrs = partials_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + tl.arange(0, BLOCK_D)
    tl.store(partials_ptrs, sum_weight, mask=tl.arange(0, BLOCK_D) < channels)
    tl.store(partials_ptrs + channels, sum_bias, mask=tl.arange(0, BLOCK_D) < channels)


# ----- the convolution's gradients, for both


@triton.jit(do_not_specialize=_SIZES)
def _convolution_backward_kernel(
    grad_ptr,
    x_ptr,
    update_ptr,
    scale_ptr,
    weight_ptr,
    grad_s_ptr,
    grad_update_ptr,
    partials_ptr,
    positions,
    height,
    width,
    channels,
    x_stride_b,
    x_stride_y,
    x_stride_x,
    x_stride_d,
    update_stride_b,
    update_stride_y,
    update_stride_x,
    update_stride_d,
    RESIDUAL: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of s and, with a scale, of the update, and partial sums for weight and bias.

    `grad` is the gradient of bias + conv(s) [+ s] with s = x [+ scale * update], as tokens in DTYPE. The tap that leads
    from p to q multiplies s(q) for the result p, so it also joins s(q) with grad(p). Sums are (programs, 10, channels):
    nine taps, then the bias.
    """
    d_tiles = tl.cdiv(channels, BLOCK_D)
    d = (tl.program_id(0) % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    first = tl.program_id(0) // d_tiles
    d_valid = d < channels
    # Nine names each, because Triton has no arrays of tiles.
    w0 = _weight(weight_ptr, d, d_valid, 0, DTYPE)
    w1 = _weight(weight_ptr, d, d_valid, 1, DTYPE)
    w2 = _weight(weight_ptr, d, d_valid, 2, DTYPE)
    w3 = _weight(weight_ptr, d, d_valid, 3, DTYPE)
    w4 = _weight(weight_ptr, d, d_valid, 4, DTYPE)
    w5 = _weight(weight_ptr, d, d_valid, 5, DTYPE)
    w6 = _weight(weight_ptr, d, d_valid, 6, DTYPE)
    w7 = _weight(weight_ptr, d, d_valid, 7, DTYPE)
    w8 = _weight(weight_ptr, d, d_valid, 8, DTYPE)
    a0 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    a1 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    a2 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    a3 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    a4 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    a5 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    a6 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    a7 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    a8 = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    sum_bias = tl.zeros((BLOCK_P, BLOCK_D), DTYPE)
    for tile in range(TILES):
        p = (first * TILES + tile) * BLOCK_P + tl.arange(0, BLOCK_P)
        image, row, column = _image_row_column(p, height, width)
        p_valid = (p < positions)[:, None]
        valid = p_valid & d_valid
        x_ptrs = _token_ptrs(x_ptr, image, row, column, d, x_stride_b, x_stride_y, x_stride_x, x_stride_d)
        s = tl.load(x_ptrs, mask=valid, other=0).to(DTYPE)
        if update_ptr is not None:
            update_ptrs = _token_ptrs(
                update_ptr, image, row, column, d, update_stride_b, update_stride_y, update_stride_x, update_stride_d
            )
            update = tl.load(update_ptrs, mask=valid, other=0).to(DTYPE)
            if scale_ptr is not None:
                update *= tl.load(scale_ptr + image, mask=p_valid, other=0).to(DTYPE)
            s += update

        ptrs = grad_ptr + p.to(tl.int64)[:, None] * channels + d
        line = width * channels
        g0 = _tap(ptrs, valid, row, column, height, width, line, channels, 1, 1, DTYPE)
        g1 = _tap(ptrs, valid, row, column, height, width, line, channels, 1, 0, DTYPE)
        g2 = _tap(ptrs, valid, row, column, height, width, line, channels, 1, -1, DTYPE)
        g3 = _tap(ptrs, valid, row, column, height, width, line, channels, 0, 1, DTYPE)
        g4 = _tap(ptrs, valid, row, column, height, width, line, channels, 0, 0, DTYPE)
        g5 = _tap(ptrs, valid, row, column, height, width, line, channels, 0, -1, DTYPE)
        g6 = _tap(ptrs, valid, row, column, height, width, line, channels, -1, 1, DTYPE)
        g7 = _tap(ptrs, valid, row, column, height, width, line, channels, -1, 0, DTYPE)
        g8 = _tap(ptrs, valid, row, column, height, width, line, channels, -1, -1, DTYPE)
        grad_s = w0 * g0 + w1 * g1 + w2 * g2 + w3 * g3 + w4 * g4 + w5 * g5 + w6 * g6 + w7 * g7 + w8 * g8
        if RESIDUAL:
            grad_s += g4
        offsets = p.to(tl.int64)[:, None] * channels + d
        tl.store(grad_s_ptr + offsets, grad_s, mask=valid)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + image, mask=p_valid, other=0).to(DTYPE)
            tl.store(grad_update_ptr + offsets, grad_s * scale, mask=valid)
        a0 += s * g0
        a1 += s * g1
        a2 += s * g2
        a3 += s * g3
        a4 += s * g4
        a5 += s * g5
        a6 += s * g6
        a7 += s * g7
        a8 += s * g8
        sum_bias += g4

    partials_ptrs = partials_ptr + first.to(tl.int64) * 10 * channels + d
    tl.store(partials_ptrs, tl.sum(a0, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + channels, tl.sum(a1, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + 2 * channels, tl.sum(a2, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + 3 * channels, tl.sum(a3, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + 4 * channels, tl.sum(a4, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + 5 * channels, tl.sum(a5, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + 6 * channels, tl.sum(a6, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + 7 * channels, tl.sum(a7, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + 8 * channels, tl.sum(a8, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + 9 * channels, tl.sum(sum_bias, axis=0)[None, :], mask=d_valid)


# ----- sums of the partial sums


@triton.jit
def _sum_rows(ptr, rows, stride, d, d_valid, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    total = tl.zeros((BLOCK_ROWS, d.shape[0]), DTYPE)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        ptrs = ptr + row.to(tl.int64) * stride + d[None, :]
        total += tl.load(ptrs, mask=(row < rows) & d_valid[None, :], other=0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["rows", "norm_rows"])
def _sums_kernel(
    partials_ptr,
    norm_partials_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    rows,
    norm_rows,
    channels,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over the rows of (rows, 10, channels), for nine taps and the bias, and of (norm_rows, 2, channels), for the
    norm's weight and bias. A program computes one of the ten or twelve sums for BLOCK_D channels.
    """
    d_tiles = tl.cdiv(channels, BLOCK_D)
    d = (tl.program_id(0) % d_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    which = tl.program_id(0) // d_tiles
    d_valid = d < channels
    if which < 10:
        total = _sum_rows(partials_ptr + which * channels, rows, 10 * channels, d, d_valid, DTYPE, BLOCK_ROWS)
        if which < 9:
            tl.store(weight_ptr + d * 9 + which, total, mask=d_valid)
        else:
            tl.store(bias_ptr + d, total, mask=d_valid)
    elif norm_partials_ptr is not None:
        ptr = norm_partials_ptr + (which - 10) * channels
        total = _sum_rows(ptr, norm_rows, 2 * channels, d, d_valid, DTYPE, BLOCK_ROWS)
        if which == 10:
            tl.store(norm_weight_ptr + d, total, mask=d_valid)
        else:
            tl.store(norm_bias_ptr + d, total, mask=d_valid)


# ----- launches


_MOST_POSITIONS = 2**31 - 2**16  # 32 bits count positions, and the last tile may extend further
_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def _count_positions(x: Tensor) -> int:
    positions = x.shape[0] * x.shape[1] * x.shape[2]
    if positions >= _MOST_POSITIONS:
        raise ValueError(f"x has {positions} tokens; on a GPU there may be at most {_MOST_POSITIONS - 1}")
    return positions


def _stored(x: Tensor) -> torch.dtype:
    """The dtype of a buffer for a result in x's dtype. In tests on a CPU, Triton's interpreter cannot round."""
    return x.dtype if x.is_cuda else reference.computed_dtype(x)


def _computed(x: Tensor) -> tl.dtype:
    return _TRITON_DTYPES[reference.computed_dtype(x)]


Tiling = dict[str, int]  # tile sizes and warps of a program, as arguments of a kernel


# The sizes were the fastest on an H100, at the shapes of Spatial-Mamba Tiny and a batch of
# 128. They are cached, because the host's time limits small kernels.


def _power_of_2(channels: int) -> int:
    """The next power of two, and at least 16, which Triton sums over without trouble."""
    return max(triton.next_power_of_2(channels), 16)


@functools.cache
def _silu_tiling(channels: int) -> Tiling:
    """Positions of one image times channels. Channels are adjacent in tokens, and positions in planes."""
    return dict(BLOCK_P=16, BLOCK_D=min(_power_of_2(channels), 64), num_warps=2)


@functools.cache
def _norm_tiling(channels: int, backward: bool) -> Tiling:
    """Positions with all their channels."""
    block_d = _power_of_2(channels)
    if backward:
        block_p = max(min(2048 // block_d, 16), 1)
        warps = 4 if block_d >= 512 else 2
    else:
        block_p = max(2048 // block_d, min(8, max(8192 // block_d, 1)))
        warps = 4 if block_d <= 64 else max(block_p * block_d // 1024, 2)
    warps = max(warps, min(block_d // 512, 16))
    return dict(BLOCK_P=block_p, BLOCK_D=block_d, num_warps=warps)


@functools.cache
def _convolution_tiling(channels: int) -> Tiling:
    """Few elements per thread, because a thread holds nine taps and ten sums for each."""
    block_d = min(_power_of_2(channels), 32)
    return dict(BLOCK_P=256 // block_d, BLOCK_D=block_d, num_warps=2)


# A program adds all rows of its 8 channels (32 bytes a row), and loads 256 rows at once.
_SUMS_TILING: Tiling = dict(BLOCK_ROWS=256, BLOCK_D=8, num_warps=4)


def tiles_of_a_program(positions: int, block_p: int, d_tiles: int) -> int:
    """The most tiles, up to 32, that leave at least 2000 programs. Fewer programs store fewer partial sums."""
    tiles = 32
    while tiles > 1 and positions * d_tiles < 2000 * block_p * tiles:
        tiles //= 2
    return tiles


def _unit(stride: int) -> int:
    """The largest power of two up to 8 that divides a stride. The widest access has 8 elements of 16 bits.

    For the numbers that it gets at run time, Triton knows at most that 16 divides them. So a kernel gets a stride as
    `stride // unit` and the constant `unit`. Triton then knows that `unit` divides their product.
    """
    return min(stride & -stride, 8) or 8


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor | None,
    grads: Sequence[Tensor] = (),
    grad_c: Tensor | None = None,
) -> None:
    """Compute y; with gradients of y, which must have the same strides, compute grad_c instead."""
    batch, height, width, channels = x.shape
    plane = height * width
    unit = _unit(plane)
    tiling = _silu_tiling(channels)
    rows = [grad.reshape(batch, channels, plane) for grad in grads]
    launch(
        _silu_kernel,
        batch * _ceil_div(plane, tiling["BLOCK_P"]) * _ceil_div(channels, tiling["BLOCK_D"]),
        *(x, weight.contiguous(), bias.contiguous(), y, *rows, *(None,) * (3 - len(rows)), grad_c),
        *(height, width, channels, plane // unit, *x.stride(), *(rows[0].stride() if rows else (0, 0, 0))),
        UNIT=unit,
        DTYPE=_computed(x),
        **tiling,
    )


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`dwconv2d.depthwise_silu` without its gradient."""
    reference.check_silu_inputs(x, weight, bias)
    batch, height, width, channels = x.shape
    y = x.new_empty((batch, channels, height, width), dtype=_stored(x))
    _silu(x, weight, bias, y)
    return y.to(x.dtype)


def depthwise_silu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_2: Tensor | None = None,
    grad_3: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `depthwise_silu` for x, weight and bias, from the sum of up to three gradients of its planes."""
    reference.check_silu_backward_inputs(grad, x, weight, bias, grad_2, grad_3)
    grad_c = x.new_empty(x.shape, dtype=reference.computed_dtype(x))
    grads = [g for g in (grad, grad_2, grad_3) if g is not None]
    if any(g.stride() != grad.stride() for g in grads):
        grads = [sum(g.to(grad_c.dtype) for g in grads)]
    _silu(x, weight, bias, None, grads, grad_c)
    grad_x, partials, _ = _convolution_backward(grad_c, x, weight, residual=False)
    grad_weight, grad_bias = _reduce_partials(partials)
    return grad_x, grad_weight.view(weight.shape).to(weight.dtype), grad_bias.to(bias.dtype)


def _reduce_partials(partials: Tensor, norm_partials: Tensor | None = None) -> list[Tensor]:
    """Gradients of weight (channels, 9), bias and the norm's parameters from partial sums (rows, 10 or 2, channels).

    One launch writes them all. PyTorch would need three launches for the first two, and two for the others.
    """
    channels = partials.shape[2]
    grads = [
        partials.new_empty(channels, 9),
        *(partials.new_empty(channels) for _ in range(1 if norm_partials is None else 3)),
    ]
    if len(partials) == 0:
        return [grad.zero_() for grad in grads]
    launch(
        _sums_kernel,
        (10 if norm_partials is None else 12) * _ceil_div(channels, _SUMS_TILING["BLOCK_D"]),
        *(partials, norm_partials, *grads, *((None, None) if norm_partials is None else ())),
        *(len(partials), 0 if norm_partials is None else len(norm_partials), channels),
        DTYPE=_TRITON_DTYPES[partials.dtype],
        **_SUMS_TILING,
    )
    return grads


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: bool,
    update: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the contiguous gradient of s = x [+ scale * update], partial sums of the gradients of weight and bias in
    `grad`'s dtype, and the gradient of the update, which differs from that of s if there is a scale and is otherwise
    empty.
    """
    _, height, width, channels = x.shape
    positions = _count_positions(x)
    tiling = _convolution_tiling(channels)
    d_tiles = _ceil_div(channels, tiling["BLOCK_D"])
    tiles = tiles_of_a_program(positions, tiling["BLOCK_P"], d_tiles)
    programs = _ceil_div(positions, tiling["BLOCK_P"] * tiles)
    grad_s = x.new_empty(x.shape, dtype=_stored(x))
    grad_update = x.new_empty(0) if scale is None else torch.empty_like(grad_s)
    partials = grad.new_empty(programs, 10, channels)
    launch(
        _convolution_backward_kernel,
        programs * d_tiles,
        *(grad, x, update, scale, weight.contiguous(), grad_s, grad_update, partials),
        *(positions, height, width, channels, *x.stride(), *((0,) * 4 if update is None else update.stride())),
        RESIDUAL=residual,
        TILES=tiles,
        DTYPE=_computed(x),
        **tiling,
    )
    return grad_s.to(x.dtype), partials, grad_update.to(x.dtype)


def depthwise_residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    update: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dwconv2d.depthwise_residual_norm` without its gradient."""
    reference.check_residual_norm_inputs(x, weight, bias, norm_weight, norm_bias, update, scale)
    _, height, width, channels = x.shape
    positions = _count_positions(x)
    tiling = _norm_tiling(channels, backward=False)
    r = x.new_empty(x.shape, dtype=_stored(x))
    n = torch.empty_like(r)
    launch(
        _residual_norm_kernel,
        _ceil_div(positions, tiling["BLOCK_P"]),
        *(x, update, scale, weight.contiguous(), bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()),
        *(r, n, positions, height, width, channels, *x.stride()),
        *((0,) * 4 if update is None else update.stride()),
        EPS=eps,
        STORED=_TRITON_DTYPES[x.dtype],
        BY_BITS=not x.is_cuda,
        DTYPE=_computed(x),
        **tiling,
    )
    return r.to(x.dtype), n.to(x.dtype)


def depthwise_residual_norm_backward(
    grad_r: Tensor,
    grad_n: Tensor,
    r: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    update: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `depthwise_residual_norm` for s, weight, bias, norm_weight, norm_bias and, with a scale, update.

    Without a scale, the update's gradient is that of s, and the last result is empty. r is the forward pass's result.
    Gradients of parameters are float32, or float64 for float64.
    """
    reference.check_residual_norm_backward_inputs(grad_r, grad_n, r, x, weight, norm_weight, update, scale)
    channels = x.shape[3]
    positions = _count_positions(x)
    tiling = _norm_tiling(channels, backward=True)
    tiles = tiles_of_a_program(positions, tiling["BLOCK_P"], 1)
    programs = _ceil_div(positions, tiling["BLOCK_P"] * tiles)
    grad = x.new_empty(x.shape, dtype=reference.computed_dtype(x))
    norm_partials = grad.new_empty(programs, 2, channels)
    grad_r, grad_n = grad_r.reshape(positions, channels), grad_n.reshape(positions, channels)
    launch(
        _norm_backward_kernel,
        programs,
        *(grad_r, grad_n, r.contiguous(), norm_weight.contiguous(), grad, norm_partials),
        *(positions, channels, *grad_r.stride(), *grad_n.stride()),
        EPS=eps,
        TILES=tiles,
        DTYPE=_computed(x),
        **tiling,
    )
    grad_s, partials, grad_update = _convolution_backward(grad, x, weight, True, update, scale)
    grad_weight, *others = _reduce_partials(partials, norm_partials)
    return grad_s, grad_weight.view(weight.shape), *others, grad_update
