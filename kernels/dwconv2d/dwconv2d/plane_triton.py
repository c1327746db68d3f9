"""The fusion, the dilated convolution and their gradients in Triton, for GPUs without a compiled kernel.

One program owns a tile of positions and channels. Positions are numbered through the planes of all images, row after
row and image after image, so that small planes leave no lanes idle. Each tap is one load for the whole tile, with rows
and columns clamped or masked. Overlapping taps find their values in the L1 cache.

The transpose of replicate padding adds what falls outside the plane to its border: a border row collects the gradients
of several rows. `_fold_kernel` computes these sums once, before the adjoint, and stores them in a margin around the
plane of gradients. The gradient of the plane is then again one load for each tap, see `_source`.

The kernels store partial sums over positions and over channels, and PyTorch adds them in a fixed order. There are no
atomics, so results repeat to the bit. Everything is computed in float32 (float64 for float64) and rounded once, when it
is stored.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwconv2d import plane_reference as reference

# Numbers that differ from call to call. A kernel that is compiled for one value would not be faster. The number of
# channels is not in the list, because Triton loads several channels at once if it knows that 16 divides their number.
_SIZES = ["images", "height", "width", "margin_y", "margin_x"]
_FOLD_SIZES = ["outer", "side_by_side", "outer_stride", "along_stride", "length", "margin"]


# ----- positions and memory


@triton.jit
def _positions(tile, height, width, BLOCK_P: tl.constexpr, INDEX_64: tl.constexpr):
    """Image, row and column of each position of a tile, as columns (BLOCK_P, 1).

    Tensors may have more than 2^31 elements. So images, channels and states have 64 bits, because they are multiplied
    by strides. Rows and columns need 64 bits only if a single plane is that large; 32 bits take half the registers.
    """
    start = tile.to(tl.int64) * BLOCK_P
    first_row = start // width
    along = (start % width).to(tl.int32) + tl.arange(0, BLOCK_P)[:, None]
    down = (first_row % height).to(tl.int32) + along // width
    index: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    return first_row // height + down // height, (down % height).to(index), (along % width).to(index)


@triton.jit
def _channels(tile, channels, BLOCK_D: tl.constexpr):
    """The channels of a tile, as a row (1, BLOCK_D), and which of them exist."""
    d = tile.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return d, d < channels


@triton.jit
def _load(ptrs, valid, dtype: tl.constexpr):
    return tl.load(ptrs, mask=valid, other=0).to(dtype)


@triton.jit
def _store_partials(ptrs, valid, tile):
    """One partial sum over the tile's positions for each channel."""
    tl.store(ptrs, tl.sum(tile, axis=0)[None, :], mask=valid)


# ----- taps


@triton.jit
def _source(q, offset, length, margin, REPLICATE: tl.constexpr, ADJOINT: tl.constexpr):
    """Along one axis, the index that a tap reads for position q, and where there is anything to read.

    A convolution reads position q + offset. Its adjoint gathers, for q, from each p that has read q. Usually, this is
    only q - offset. But if q is at a border and the offset leads out of the plane, all p from q to |offset| away have
    read q. Their sum lies in the margin, |offset| outside the border. It has at most `length` terms, so a margin of
    length - 1 is enough.
    """
    inside = tl.full(q.shape, True, tl.int1)
    index = q - offset if ADJOINT else q + offset
    if ADJOINT or not REPLICATE:
        inside = (index >= 0) & (index < length)
    if REPLICATE:
        last = length - 1
        clamped = tl.minimum(tl.maximum(q + offset, 0), last)
        if ADJOINT:
            at_border = clamped == q
            index = tl.where(at_border, tl.minimum(tl.maximum(q + offset, -margin), last + margin), index)
            inside = inside | at_border
        else:
            index = clamped
    return index, inside


@triton.jit
def _row_of_taps(
    total,
    factor,
    ptrs,
    column,
    valid,
    taps_ptrs,
    partials_ptrs,
    d_valid,
    width,
    stride_x,
    margin_x,
    KERNEL_X: tl.constexpr,
    DILATION: tl.constexpr,
    REPLICATE: tl.constexpr,
    ADJOINT: tl.constexpr,
    SKIP_CENTRE: tl.constexpr,
):
    for j in tl.static_range(KERNEL_X):
        if not (SKIP_CENTRE and j == KERNEL_X // 2):
            offset = (j - KERNEL_X // 2) * DILATION
            index, inside = _source(column, offset, width, margin_x, REPLICATE, ADJOINT)
            value = _load(ptrs + index * stride_x, valid & inside, total.dtype)
            total += _load(taps_ptrs + j, d_valid, total.dtype) * value
            if partials_ptrs is not None:
                _store_partials(partials_ptrs + j, d_valid, factor * value)
    return total


@triton.jit
def _convolve(
    factor,
    ptrs,
    row,
    column,
    valid,
    taps_ptrs,
    partials_ptrs,
    d_valid,
    height,
    width,
    stride_y,
    stride_x,
    margin_y,
    margin_x,
    LEVELS: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    UNROLLED: tl.constexpr,
    DILATION: tl.constexpr,
    REPLICATE: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """The sum over taps of tap times value. `partials_ptrs` receives, for each tap, the sum of factor times value.

    Levels are kernels of the same size with dilations 2 apart. They share their centre, which only the first one has.
    With several levels, UNROLLED must be KERNEL_Y.
    """
    total = tl.zeros(valid.shape, taps_ptrs.dtype.element_ty)
    for level in tl.static_range(LEVELS):
        for start in range(0, KERNEL_Y, UNROLLED):
            for i in tl.static_range(UNROLLED):
                offset = (start + i - KERNEL_Y // 2) * (DILATION + 2 * level)
                y, inside = _source(row, offset, height, margin_y, REPLICATE, ADJOINT)
                tap = (level * KERNEL_Y + start + i) * KERNEL_X
                total = _row_of_taps(
                    total,
                    factor,
                    ptrs + y * stride_y,
                    column,
                    valid & inside,
                    taps_ptrs + tap,
                    None if partials_ptrs is None else partials_ptrs + tap,
                    d_valid,
                    width,
                    stride_x,
                    margin_x,
                    KERNEL_X,
                    DILATION + 2 * level,
                    REPLICATE,
                    ADJOINT,
                    level > 0 and i == KERNEL_Y // 2,
                )
    return total


# ----- kernels


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    source_ptr,
    taps_ptr,
    bias_ptr,
    result_ptr,
    C_ptr,
    D_ptr,
    x_ptr,
    images,
    channels,
    height,
    width,
    margin_y,
    margin_x,
    source_stride_b,
    source_stride_d,
    source_stride_n,
    source_stride_y,
    source_stride_x,
    result_stride_b,
    result_stride_d,
    result_stride_n,
    result_stride_y,
    result_stride_x,
    C_stride_b,
    C_stride_n,
    C_stride_y,
    C_stride_x,
    x_stride_b,
    x_stride_d,
    x_stride_y,
    x_stride_x,
    N: tl.constexpr,
    LEVELS: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    UNROLLED: tl.constexpr,
    DILATION: tl.constexpr,
    REPLICATE: tl.constexpr,
    ADJOINT: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The convolution of every state, or its adjoint. With C, D and x, the output equation instead of the states."""
    dtype: tl.constexpr = taps_ptr.dtype.element_ty
    d_tiles = tl.cdiv(channels, BLOCK_D)
    d, d_valid = _channels(tl.program_id(0) % d_tiles, channels, BLOCK_D)
    image, row, column = _positions(tl.program_id(0) // d_tiles, height, width, BLOCK_P, INDEX_64)
    p_valid = image < images
    valid = p_valid & d_valid
    taps_ptrs = taps_ptr + d * (LEVELS * KERNEL_Y * KERNEL_X)
    source_ptrs = source_ptr + image * source_stride_b + d * source_stride_d
    result_ptrs = result_ptr + image * result_stride_b + d * result_stride_d
    result_ptrs += row * result_stride_y + column * result_stride_x

    y = tl.zeros((BLOCK_P, BLOCK_D), dtype)
    for n in range(N):
        n_64 = tl.cast(n, tl.int64)
        fused = _convolve(
            None,
            source_ptrs + n_64 * source_stride_n,
            row,
            column,
            valid,
            taps_ptrs,
            None,
            d_valid,
            height,
            width,
            source_stride_y,
            source_stride_x,
            margin_y,
            margin_x,
            LEVELS,
            KERNEL_Y,
            KERNEL_X,
            UNROLLED,
            DILATION,
            REPLICATE,
            ADJOINT,
        )
        if C_ptr is None:
            if bias_ptr is not None:
                fused += _load(bias_ptr + d, d_valid, dtype)
            tl.store(result_ptrs + n_64 * result_stride_n, fused, mask=valid)
        else:
            C_ptrs = C_ptr + image * C_stride_b + n_64 * C_stride_n + row * C_stride_y + column * C_stride_x
            y += _load(C_ptrs, p_valid, dtype) * fused
    if C_ptr is not None:
        x_ptrs = x_ptr + image * x_stride_b + d * x_stride_d + row * x_stride_y + column * x_stride_x
        y += _load(D_ptr + d, d_valid, dtype) * _load(x_ptrs, valid, dtype)
        tl.store(result_ptrs, y, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    h_ptr,
    taps_ptr,
    grad_ptr,
    grad_fused_ptr,
    grad_taps_ptr,
    grad_bias_ptr,
    C_ptr,
    D_ptr,
    x_ptr,
    grad_C_ptr,
    grad_D_ptr,
    grad_x_ptr,
    images,
    channels,
    height,
    width,
    h_stride_b,
    h_stride_d,
    h_stride_n,
    h_stride_y,
    h_stride_x,
    grad_stride_b,
    grad_stride_d,
    grad_stride_n,
    grad_stride_y,
    grad_stride_x,
    grad_fused_stride_b,
    grad_fused_stride_d,
    grad_fused_stride_n,
    grad_fused_stride_y,
    grad_fused_stride_x,
    C_stride_b,
    C_stride_n,
    C_stride_y,
    C_stride_x,
    x_stride_b,
    x_stride_d,
    x_stride_y,
    x_stride_x,
    grad_x_stride_b,
    grad_x_stride_d,
    grad_x_stride_y,
    grad_x_stride_x,
    N: tl.constexpr,
    LEVELS: tl.constexpr,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    UNROLLED: tl.constexpr,
    DILATION: tl.constexpr,
    REPLICATE: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX_64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients except that of h. `_forward_kernel` makes that one from the gradient of the fused states.

    A program processes several tiles of channels, so that it stores few partial sums of C's gradient.
    """
    dtype: tl.constexpr = taps_ptr.dtype.element_ty
    taps: tl.constexpr = LEVELS * KERNEL_Y * KERNEL_X
    groups = tl.cdiv(channels, GROUP * BLOCK_D)
    group = tl.program_id(0) % groups
    tile = (tl.program_id(0) // groups).to(tl.int64)
    image, row, column = _positions(tile, height, width, BLOCK_P, INDEX_64)
    p_valid = image < images
    grad_ptrs = grad_ptr + image * grad_stride_b + row * grad_stride_y + column * grad_stride_x

    if x_ptr is not None:
        x_ptrs = x_ptr + image * x_stride_b + row * x_stride_y + column * x_stride_x
        grad_x_ptrs = grad_x_ptr + image * grad_x_stride_b + row * grad_x_stride_y + column * grad_x_stride_x
        for k in range(GROUP):
            d, d_valid = _channels(group * GROUP + k, channels, BLOCK_D)
            valid = p_valid & d_valid
            grad = _load(grad_ptrs + d * grad_stride_d, valid, dtype)
            x = _load(x_ptrs + d * x_stride_d, valid, dtype)
            _store_partials(grad_D_ptr + tile * channels + d, d_valid, grad * x)
            tl.store(grad_x_ptrs + d * grad_x_stride_d, _load(D_ptr + d, d_valid, dtype) * grad, mask=valid)

    for n in range(N):
        n_64 = tl.cast(n, tl.int64)
        grad_C = tl.zeros((BLOCK_P, BLOCK_D), dtype)
        for k in range(GROUP):
            d, d_valid = _channels(group * GROUP + k, channels, BLOCK_D)
            valid = p_valid & d_valid
            grad = _load(grad_ptrs + d * grad_stride_d + n_64 * grad_stride_n, valid, dtype)
            grad_fused = grad
            if C_ptr is not None:
                C_ptrs = C_ptr + image * C_stride_b + n_64 * C_stride_n
                grad_fused *= _load(C_ptrs + row * C_stride_y + column * C_stride_x, p_valid, dtype)
            if grad_fused_ptr is not None:
                fused_ptrs = grad_fused_ptr + image * grad_fused_stride_b + n_64 * grad_fused_stride_n
                fused_ptrs += row * grad_fused_stride_y + column * grad_fused_stride_x
                tl.store(fused_ptrs + d * grad_fused_stride_d, grad_fused, mask=valid)
            if grad_bias_ptr is not None:
                _store_partials(grad_bias_ptr + tile * channels + d, d_valid, grad)
            fused = _convolve(
                grad_fused,
                h_ptr + image * h_stride_b + d * h_stride_d + n_64 * h_stride_n,
                row,
                column,
                valid,
                taps_ptr + d * taps,
                grad_taps_ptr + ((tile * N + n_64) * channels + d) * taps,
                d_valid,
                height,
                width,
                h_stride_y,
                h_stride_x,
                0,
                0,
                LEVELS,
                KERNEL_Y,
                KERNEL_X,
                UNROLLED,
                DILATION,
                REPLICATE,
                False,
            )
            grad_C += grad * fused
        if grad_C_ptr is not None:
            if BLOCK_D > 1:  # Triton 3.0 crashes on a sum over a single element
                grad_C = tl.sum(grad_C, axis=1)[:, None]
            state = (group.to(tl.int64) * images + image) * N + n_64
            tl.store(grad_C_ptr + (state * height + row) * width + column, grad_C, mask=p_valid)


@triton.jit(do_not_specialize=_FOLD_SIZES)
def _fold_kernel(first_ptr, outer, side_by_side, outer_stride, along_stride, length, margin, BLOCK: tl.constexpr):
    """Along one axis, at distance k = 1, ..., margin beyond each border, store the sum of the k + 1 outermost values.

    Every lane has a line of `length` values. There are `outer` groups of lines, and the lines of a
    group are `side_by_side` in memory.
    """
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = lane // side_by_side < outer
    stride = tl.cast(along_stride, tl.int64)
    first_ptrs = first_ptr + lane // side_by_side * outer_stride + lane % side_by_side
    last_ptrs = first_ptrs + (length - 1) * stride
    first = tl.load(first_ptrs, mask=valid, other=0)
    last = tl.load(last_ptrs, mask=valid, other=0)
    k = 1
    while k <= margin:
        first += tl.load(first_ptrs + k * stride, mask=valid, other=0)
        last += tl.load(last_ptrs - k * stride, mask=valid, other=0)
        tl.store(first_ptrs - k * stride, first, mask=valid)
        tl.store(last_ptrs + k * stride, last, mask=valid)
        k += 1


# ----- launches

_INT32_MAX = 2**31 - 1
_OutputEquation = tuple[Tensor, Tensor, Tensor]  # C, D, x


class _Convolution(NamedTuple):
    """Its taps, (D, levels * rows * columns): `levels` kernels with dilations 2 apart."""

    taps: Tensor
    levels: int
    rows: int
    columns: int
    dilation: int
    replicate: bool

    def margins(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the margin that planes of gradients need for the adjoint: see `_source`."""
        if not self.replicate:
            return 0, 0
        dilation = self.dilation + 2 * (self.levels - 1)
        return min(self.rows // 2 * dilation, height - 1), min(self.columns // 2 * dilation, width - 1)

    def constants(self) -> dict[str, int | bool]:
        return dict(
            LEVELS=self.levels,
            KERNEL_Y=self.rows,
            KERNEL_X=self.columns,
            UNROLLED=self.rows if self.rows <= 7 else 1,  # larger kernels would make very long programs
            DILATION=self.dilation,
            REPLICATE=self.replicate,
        )


class _Tiling(NamedTuple):
    """Sizes of tiles, and the number of tiles along each of their axes."""

    block_p: int
    block_d: int
    p_tiles: int
    d_tiles: int


def _tiling(planes: tuple[Tensor | None, ...], elements: int) -> _Tiling:
    """Tiles of up to `elements` elements, positions times channels of `planes`, (B, D, ..., H, W).

    A tile has as many positions as possible: the larger the tile, the fewer rows are loaded by two tiles. But if
    channels are adjacent in some tensor's memory, a tile has at least 8 channels, to use what a GPU reads at once.

    The callers' numbers of elements and warps were chosen from the compiled code for sm_90, not from timings. The
    forward kernel has 4 elements per lane, for few registers. The backward kernel has one warp, because its sums then
    need no barriers, and 8 elements per lane, because with 16 it spills three kilobytes.
    """
    batch, channels, *_, height, width = planes[0].shape
    positions = batch * height * width
    most_d = triton.next_power_of_2(channels)
    least_d = min(most_d, 8) if any(_channels_innermost(p) for p in planes if p is not None) else 1
    # It is at least 16, because Triton 3.0 crashes on a sum over a single position.
    block_p = min(max(triton.next_power_of_2(positions), 16), elements // least_d)
    block_d = min(most_d, elements // block_p)
    return _Tiling(block_p, block_d, triton.cdiv(positions, block_p), triton.cdiv(channels, block_d))


def _channels_innermost(planes: Tensor) -> bool:
    return planes.stride(1) == 1 < planes.shape[1] and planes.stride(-1) != 1


def _needs_64_bits(planes: tuple[Tensor | None, ...], margin_y: int, margin_x: int) -> bool:
    """Whether offsets within a plane, margins included, need more than 32 bits."""
    return any(
        (p.shape[-2] + 2 * margin_y) * p.stride(-2) + (p.shape[-1] + 2 * margin_x) * p.stride(-1) > _INT32_MAX
        for p in planes
        if p is not None
    )


def _with_states(planes: Tensor) -> Tensor:
    """(B, D, H, W) or (B, D, N, H, W) -> (B, D, N, H, W)."""
    return planes.unsqueeze(2) if planes.dim() == 4 else planes


def _strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if t is None else t.stride()


def _result_like(x: Tensor, computed: torch.dtype) -> Tensor:
    """An empty result in x's memory format. The caller casts it to x's dtype.

    In tests on a CPU, Triton's interpreter truncates to bfloat16 instead of rounding, so PyTorch does the cast there.
    """
    dtype = x.dtype if x.is_cuda else computed
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=reference.memory_format(x))


def _launch(kernel: triton.JITFunction, programs: int, first: Tensor, *args, **constants) -> None:
    if programs > 0:
        with torch.cuda.device_of(first):
            kernel[(programs,)](first, *args, **constants)


def _convolve_planes(
    source: Tensor,
    convolution: _Convolution,
    result: Tensor,
    bias: Tensor | None = None,
    equation: _OutputEquation | None = None,
    adjoint: bool = False,
) -> None:
    """Run `_forward_kernel` from `source` to `result`, both (B, D, H, W) or (B, D, N, H, W)."""
    C, D, x = equation or (None, None, None)
    batch, channels, *_, height, width = source.shape
    tiling = _tiling((source, result), 1024)
    source, result = _with_states(source), _with_states(result)
    _launch(
        _forward_kernel,
        tiling.p_tiles * tiling.d_tiles,
        *(source, convolution.taps, bias, result, C, D, x),
        *(batch, channels, height, width, *convolution.margins(height, width)),
        *(*source.stride(), *result.stride(), *_strides(C, 4), *_strides(x, 4)),
        N=source.shape[2],
        **convolution.constants(),
        ADJOINT=adjoint,
        INDEX_64=_needs_64_bits((source, result, C, x), *convolution.margins(height, width)),
        BLOCK_P=tiling.block_p,
        BLOCK_D=tiling.block_d,
        num_warps=8,
    )


def _with_margins(planes: Tensor, margin_y: int, margin_x: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialised planes (B, D, N, H, W) with margins around them, and their memory.

    The memory is (planes, H + 2 margin_y, W + 2 margin_x, D) if channels are innermost in `planes`. Otherwise, its last
    size is 1.
    """
    batch, channels, states, height, width = planes.shape
    rows, columns = height + 2 * margin_y, width + 2 * margin_x
    if _channels_innermost(planes):
        memory = planes.new_empty(batch * states, rows, columns, channels, dtype=dtype)
        extended = memory.view(batch, states, rows, columns, channels).permute(0, 4, 1, 2, 3)
    else:
        memory = planes.new_empty(batch * channels * states, rows, columns, 1, dtype=dtype)
        extended = memory.view(batch, channels, states, rows, columns)
    return extended[..., margin_y : margin_y + height, margin_x : margin_x + width], memory


def _fold(memory: Tensor, height: int, width: int) -> None:
    """Fill the margins: first above and below the planes, then to the left and the right of all rows."""
    planes, rows, columns, channels = memory.shape  # 1 channel unless channels are innermost
    margin_y, margin_x = (rows - height) // 2, (columns - width) // 2
    row = columns * channels  # elements of a row
    _launch(
        _fold_kernel,
        triton.cdiv(planes * width * channels, 256),
        *(memory[:, margin_y:, margin_x:], planes, width * channels),  # the columns of a plane are side by side
        *(rows * row, row, height, margin_y),
        BLOCK=256,
    )
    _launch(
        _fold_kernel,
        triton.cdiv(planes * rows * channels, 256),
        *(memory[:, :, margin_x:], planes * rows, channels),  # the channels of a row are side by side
        *(row, channels, width, margin_x),
        BLOCK=256,
    )


class _Gradients(NamedTuple):
    """The results of `_backward_kernel`, with its partial sums added up."""

    fused: Tensor  # with margins; `_convolve_planes` makes the gradient of h from it
    taps: Tensor
    bias: Tensor | None
    C: Tensor | None
    D: Tensor | None
    x: Tensor | None


def _gradients(
    grad: Tensor, h: Tensor, convolution: _Convolution, bias: bool = False, equation: _OutputEquation | None = None
) -> _Gradients:
    """Gradients from `grad` of the convolution's result or, with `equation`, of y. `bias`: also that of the bias."""
    C, D, x = equation or (None, None, None)
    h, taps = _with_states(h), convolution.taps
    grad = _with_states(grad).expand(h.shape)
    batch, channels, states, height, width = h.shape
    tiling = _tiling((h, grad, x), 256)
    group = min(max(8 // tiling.block_d, 1), tiling.d_tiles) if equation else 1
    groups = triton.cdiv(tiling.d_tiles, group)

    fused, memory = None, None
    if convolution.replicate:
        fused, memory = _with_margins(h, *convolution.margins(height, width), taps.dtype)
    grad_taps = taps.new_empty(tiling.p_tiles, states, *taps.shape)
    grad_bias = taps.new_empty(tiling.p_tiles, channels) if bias else None
    grad_C = taps.new_empty(groups, *C.shape) if equation else None
    grad_D = taps.new_empty(tiling.p_tiles, channels) if equation else None
    grad_x = _result_like(x, taps.dtype) if equation else None
    _launch(
        _backward_kernel,
        tiling.p_tiles * groups,
        *(h, taps, grad, fused, grad_taps, grad_bias, C, D, x, grad_C, grad_D, grad_x),
        *(batch, channels, height, width),
        *(*h.stride(), *grad.stride(), *_strides(fused, 5), *_strides(C, 4), *_strides(x, 4), *_strides(grad_x, 4)),
        N=states,
        **convolution.constants(),
        GROUP=group,
        INDEX_64=_needs_64_bits((h, grad, fused, C, x, grad_x), 0, 0),
        BLOCK_P=tiling.block_p,
        BLOCK_D=tiling.block_d,
        num_warps=1,
    )
    if memory is not None:
        _fold(memory, height, width)
    return _Gradients(
        grad if fused is None else fused,
        grad_taps.sum((0, 1)),
        grad_bias.sum(0) if bias else None,
        grad_C.sum(0).to(C.dtype) if equation else None,
        grad_D.sum(0) if equation else None,
        grad_x.to(x.dtype) if equation else None,
    )


# ----- one depthwise convolution that keeps the plane's size


def _of_weight(weight: Tensor, dilation: int, padding_mode: str) -> _Convolution:
    computed = torch.promote_types(weight.dtype, torch.float32)
    taps = weight.to(computed).flatten(1).contiguous()
    return _Convolution(taps, 1, *weight.shape[2:], dilation, padding_mode == "replicate")


def dilated_dwconv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, padding_mode: str = "replicate"
) -> Tensor:
    """`dwconv2d.dilated_dwconv2d` without its gradient."""
    reference.check_conv_inputs(x, weight, bias, dilation, padding_mode)
    convolution = _of_weight(weight, dilation, padding_mode)
    y = _result_like(x, convolution.taps.dtype)
    _convolve_planes(x, convolution, y, None if bias is None else bias.contiguous())
    return y.to(x.dtype)


def dilated_dwconv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, padding_mode: str = "replicate"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `dilated_dwconv2d` for x, weight and bias, even if there is no bias, from `grad` of y."""
    reference.check_conv_inputs(x, weight, None, dilation, padding_mode)
    reference.check_grad(grad, x)
    convolution = _of_weight(weight, dilation, padding_mode)
    grads = _gradients(grad, x, convolution, bias=True)
    grad_x = _result_like(x, convolution.taps.dtype)
    _convolve_planes(grads.fused, convolution, grad_x, adjoint=True)
    return grad_x.to(x.dtype), grads.taps.view(weight.shape).to(weight.dtype), grads.bias.to(weight.dtype)


# ----- state fusion


def _stack(weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor) -> Tensor:
    """(D, 3, 9)"""
    return torch.stack([weight.flatten(1) for weight in (weight3, weight3_d3, weight3_d5)], 1)


_CENTRE = 4  # of the nine taps of a kernel


def _merged(weights: Tensor, alpha: Tensor) -> _Convolution:
    """The 25 taps of the three kernels, which share one centre."""
    taps = alpha[:, None] * weights
    taps[:, 0, _CENTRE] = taps[:, :, _CENTRE].sum(1)
    return _Convolution(taps.flatten(1), len(reference.DILATIONS), 3, 3, reference.DILATIONS[0], True)


def state_fusion(h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor) -> Tensor:
    """`dwconv2d.state_fusion` without its gradient."""
    reference.check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha)
    fused = h.new_empty(h.shape)
    _convolve_planes(h, _merged(_stack(weight3, weight3_d3, weight3_d5), alpha), fused)
    return fused


def state_fusion_backward(
    grad: Tensor, h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `state_fusion` for h, the three kernels and alpha, from `grad` of the fused states."""
    reference.check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha)
    reference.check_grad(grad, h)
    return _fusion_gradients(grad, h, weight3, weight3_d3, weight3_d5, alpha)[0]


def _fusion_gradients(
    grad: Tensor,
    h: Tensor,
    weight3: Tensor,
    weight3_d3: Tensor,
    weight3_d5: Tensor,
    alpha: Tensor,
    equation: _OutputEquation | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], _Gradients]:
    """The gradients of h, the three kernels and alpha, and all that `_gradients` returns."""
    weights = _stack(weight3, weight3_d3, weight3_d5)
    convolution = _merged(weights, alpha)
    grads = _gradients(grad, h, convolution, equation=equation)
    grad_h = h.new_empty(h.shape)
    _convolve_planes(grads.fused, convolution, grad_h, adjoint=True)

    # The gradients of alpha_k W_k
    grad_scaled = grads.taps.view(weights.shape)
    grad_scaled[:, 1:, _CENTRE] = grad_scaled[:, :1, _CENTRE]
    grad_weights = [(a * g).view(weight3.shape) for a, g in zip(alpha, grad_scaled.unbind(1), strict=True)]
    grad_alpha = (weights * grad_scaled).sum((0, 2))
    return (grad_h, *grad_weights, grad_alpha), grads


def state_fusion_output(
    h: Tensor,
    weight3: Tensor,
    weight3_d3: Tensor,
    weight3_d5: Tensor,
    alpha: Tensor,
    C: Tensor,
    D: Tensor,
    x: Tensor,
) -> Tensor:
    """`dwconv2d.state_fusion_output` without its gradient."""
    reference.check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x)
    y = _result_like(x, h.dtype)
    convolution = _merged(_stack(weight3, weight3_d3, weight3_d5), alpha)
    _convolve_planes(h, convolution, y, equation=(C, D.contiguous(), x))
    return y.to(x.dtype)


def state_fusion_output_backward(
    grad: Tensor,
    h: Tensor,
    weight3: Tensor,
    weight3_d3: Tensor,
    weight3_d5: Tensor,
    alpha: Tensor,
    C: Tensor,
    D: Tensor,
    x: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `state_fusion_output` for its eight inputs, from `grad` of y. The fused states are recomputed."""
    reference.check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x)
    reference.check_grad(grad, x)
    equation = C, D.contiguous(), x
    of_fusion, grads = _fusion_gradients(grad, h, weight3, weight3_d3, weight3_d5, alpha, equation)
    return *of_fusion, grads.C, grads.D, grads.x
