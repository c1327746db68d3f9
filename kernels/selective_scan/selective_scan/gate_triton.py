"""The gated norm and its gradients in Triton, for GPUs.

A program owns some positions of one image with all their channels. Lanes run along positions to read and write planes,
and along channels for tokens. Triton exchanges the values through shared memory. Programs store partial sums over
positions, and PyTorch adds them in a fixed order. There are no atomics, so results repeat to the bit.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from selective_scan import gate_reference as reference
from selective_scan.launching import launch


@triton.jit
def _tile(plane, channels, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's image, positions and channels, and which of them exist. `plane` is its number of positions."""
    tiles = tl.cdiv(plane, BLOCK_P)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    return image, p, d, p < plane, d < channels


@triton.jit
def _normalise(x, d_valid, channels, EPS: tl.constexpr):
    """LayerNorm of each position without weight and bias, and the reciprocal of the standard deviation."""
    mean = tl.sum(tl.where(d_valid, x, 0), axis=1)[:, None] / channels
    centred = tl.where(d_valid, x - mean, 0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / channels
    rstd = 1 / tl.sqrt(variance + tl.full((), EPS, x.dtype))
    return centred * rstd, rstd


@triton.jit
def _forward_kernel(
    y_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    plane,
    channels,
    y_stride_b,
    y_channel_units,
    y_stride_p,
    z_stride_b,
    z_stride_p,
    z_stride_d,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image, p, d, p_valid, d_valid = _tile(plane, channels, BLOCK_P, BLOCK_D)
    valid = p_valid & d_valid
    # Only the stride between channels comes in units: see `_unit`.
    y_ptrs = y_ptr + image * y_stride_b + d.to(tl.int64) * y_channel_units * UNIT + p.to(tl.int64) * y_stride_p
    y = tl.load(y_ptrs, mask=valid, other=0).to(DTYPE)
    z_ptrs = z_ptr + image * z_stride_b + p.to(tl.int64) * z_stride_p + d.to(tl.int64) * z_stride_d
    z = tl.load(z_ptrs, mask=valid, other=0).to(DTYPE)
    normalised, _rstd = _normalise(y, d_valid, channels, EPS)
    affine = normalised * tl.load(weight_ptr + d, mask=d_valid, other=0).to(DTYPE)
    affine += tl.load(bias_ptr + d, mask=d_valid, other=0).to(DTYPE)
    out = affine * (z / (1 + tl.exp(-z)))
    tl.store(out_ptr + (image * plane + p) * channels + d, out, mask=valid)


@triton.jit
def _backward_kernel(
    grad_ptr,
    y_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    grad_y_ptr,
    grad_z_ptr,
    partials_ptr,
    plane,
    plane_units,
    channels,
    grad_stride_b,
    grad_stride_p,
    grad_stride_d,
    y_stride_b,
    y_channel_units,
    y_stride_p,
    z_stride_b,
    z_stride_p,
    z_stride_d,
    UNIT: tl.constexpr,
    PLANE_UNIT: tl.constexpr,
    EPS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of y (planes) and z (tokens), and this program's partial sums of those of weight and bias.

    Of the strides of planes, those between channels come in units: see `_unit`.
    """
    image, p, d, p_valid, d_valid = _tile(plane, channels, BLOCK_P, BLOCK_D)
    valid = p_valid & d_valid
    y_ptrs = y_ptr + image * y_stride_b + d.to(tl.int64) * y_channel_units * UNIT + p.to(tl.int64) * y_stride_p
    y = tl.load(y_ptrs, mask=valid, other=0).to(DTYPE)
    p_64 = p.to(tl.int64)
    z_ptrs = z_ptr + image * z_stride_b + p_64 * z_stride_p + d.to(tl.int64) * z_stride_d
    z = tl.load(z_ptrs, mask=valid, other=0).to(DTYPE)
    grad_ptrs = grad_ptr + image * grad_stride_b + p_64 * grad_stride_p + d.to(tl.int64) * grad_stride_d
    grad = tl.load(grad_ptrs, mask=valid, other=0).to(DTYPE)
    weight = tl.load(weight_ptr + d, mask=d_valid, other=0).to(DTYPE)
    bias = tl.load(bias_ptr + d, mask=d_valid, other=0).to(DTYPE)

    normalised, rstd = _normalise(y, d_valid, channels, EPS)
    sigmoid = 1 / (1 + tl.exp(-z))
    grad_z = grad * (normalised * weight + bias) * (sigmoid * (1 + z * (1 - sigmoid)))
    tl.store(grad_z_ptr + (image * plane + p) * channels + d, grad_z, mask=valid)

    grad_affine = grad * (z * sigmoid)
    partials_ptrs = partials_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + d
    tl.store(partials_ptrs, tl.sum(grad_affine * normalised, axis=0)[None, :], mask=d_valid)
    tl.store(partials_ptrs + channels, tl.sum(grad_affine, axis=0)[None, :], mask=d_valid)
    grad_normalised = grad_affine * weight
    mean = tl.sum(grad_normalised, axis=1)[:, None] / channels
    along = tl.sum(grad_normalised * normalised, axis=1)[:, None] / channels
    grad_y = rstd * (grad_normalised - mean - normalised * along)
    grad_y_ptrs = grad_y_ptr + image * channels * plane + d.to(tl.int64) * (plane_units * PLANE_UNIT) + p
    tl.store(grad_y_ptrs, grad_y, mask=valid)


# ----- launches


def _stored(y: Tensor) -> torch.dtype:
    """The dtype of a buffer for a result in y's dtype. In tests on a CPU, Triton's interpreter cannot round."""
    return y.dtype if y.is_cuda else reference.computed_dtype(y)


def _unit(stride: int) -> int:
    """The largest power of two up to 8 that divides a stride. The widest access has 8 elements of 16 bits.

    For the numbers that it gets at run time, Triton knows at most that 16 divides them. So a kernel gets a stride as
    `stride // unit` and the constant `unit`. Triton then knows that `unit` divides their product.
    """
    return min(stride & -stride, 8) or 8


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _gate_tiling(channels: int, backward: bool) -> dict[str, int]:
    """Tiles of adjacent positions with all their channels. The sizes were the fastest on an H100, at the shapes
    of Spatial-Mamba Tiny.
    """
    block_d = max(triton.next_power_of_2(channels), 16)
    if block_d <= (128 if backward else 256):
        block_p = 16
    elif block_d <= 1024:
        block_p = 8
    else:
        block_p = max(8192 // block_d, 2)
    return dict(BLOCK_P=block_p, BLOCK_D=block_d, num_warps=4 if block_d <= 512 else 16)


def _rows(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Planes as (B, D, H W) and tokens as (B, H W, D)."""
    batch, channels, height, width = y.shape
    return y.reshape(batch, channels, height * width), z.reshape(batch, height * width, channels)


def _strides_and_unit(planes: Tensor) -> tuple[tuple[int, int, int], int]:
    unit = _unit(planes.stride(1))
    return (planes.stride(0), planes.stride(1) // unit, planes.stride(2)), unit


def norm_gate(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`selective_scan.norm_gate` without its gradient."""
    reference.check_inputs(y, z, weight, bias)
    out = z.new_empty(z.shape, dtype=_stored(y))
    planes, tokens = _rows(y, z)
    batch, channels, plane = planes.shape
    strides, unit = _strides_and_unit(planes)
    tiling = _gate_tiling(channels, backward=False)
    launch(
        _forward_kernel,
        batch * _ceil_div(plane, tiling["BLOCK_P"]),
        *(planes, tokens, weight.contiguous(), bias.contiguous(), out, plane, channels),
        *(*strides, *tokens.stride()),
        UNIT=unit,
        EPS=eps,
        DTYPE=tl.float64 if y.dtype == torch.float64 else tl.float32,
        **tiling,
    )
    return out.to(y.dtype)


def norm_gate_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `norm_gate` for y, z, weight and bias, from `grad` of its result. The norm is recomputed."""
    reference.check_inputs(y, z, weight, bias)
    reference.check_grad(grad, z)
    grad_y, grad_z = (t.new_empty(t.shape, dtype=_stored(y)) for t in (y, z))
    planes, tokens = _rows(y, z)
    _, grads = _rows(y, grad)
    batch, channels, plane = planes.shape
    strides, unit = _strides_and_unit(planes)
    tiling = _gate_tiling(channels, backward=True)
    programs = batch * _ceil_div(plane, tiling["BLOCK_P"])
    partials = y.new_empty(programs, 2, channels, dtype=reference.computed_dtype(y))
    launch(
        _backward_kernel,
        programs,
        *(grads, planes, tokens, weight.contiguous(), bias.contiguous(), grad_y, grad_z, partials),
        *(plane, plane // _unit(plane), channels, *grads.stride(), *strides, *tokens.stride()),
        UNIT=unit,
        PLANE_UNIT=_unit(plane),
        EPS=eps,
        DTYPE=tl.float64 if y.dtype == torch.float64 else tl.float32,
        **tiling,
    )
    grad_weight, grad_bias = partials.sum(0)
    # A copy, because results must not share memory. A second sum would take longer.
    grad_bias = grad_bias.to(bias.dtype, copy=True)
    return grad_y.to(y.dtype), grad_z.to(z.dtype), grad_weight.to(weight.dtype), grad_bias
