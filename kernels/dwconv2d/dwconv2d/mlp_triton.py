"""The two linear layers and GELU in Triton, for float16 and bfloat16 on the tensor cores of GPUs from sm_80 on.

A program owns some rows of x. It walks along the hidden channels in blocks: it computes a block, applies GELU, and adds
its product with the second weight to the result. Hidden values never leave the processor. The weights are read again by
each program, from the GPU's cache. There are no atomics, so results repeat to the bit.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dwconv2d import mlp_reference as reference
from dwconv2d.launching import launch

MAX_CHANNELS = 128  # more would leave no registers for the sums of a row
_TILING = dict(BLOCK_R=128, BLOCK_H=64, num_warps=8, num_stages=2)


@triton.jit
def _mlp_kernel(
    x_ptr,
    fc1_weight_ptr,
    fc1_bias_ptr,
    fc2_weight_ptr,
    fc2_bias_ptr,
    y_ptr,
    rows,
    x_stride_r,
    x_stride_c,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    RESULTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.arange(0, BLOCK_C)
    o = tl.arange(0, BLOCK_O)
    x_ptrs = x_ptr + r * x_stride_r + c[None, :].to(tl.int64) * x_stride_c
    x = tl.load(x_ptrs, mask=(r < rows) & (c < CHANNELS)[None, :], other=0)
    y = tl.zeros((BLOCK_R, BLOCK_O), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        h_valid = h < HIDDEN
        fc1_ptrs = fc1_weight_ptr + h[None, :] * CHANNELS + c[:, None]
        fc1 = tl.load(fc1_ptrs, mask=h_valid[None, :] & (c < CHANNELS)[:, None], other=0)
        fc1_bias = tl.load(fc1_bias_ptr + h, mask=h_valid, other=0).to(tl.float32)
        hidden = tl.dot(x, fc1) + fc1_bias[None, :]
        hidden = 0.5 * hidden * (1 + tl.erf(hidden * 0.7071067811865476))
        if HIDDEN % BLOCK_H:  # an infinity times the zeros beyond the end is NaN
            hidden = tl.where(h_valid[None, :], hidden, 0.0)
        fc2_ptrs = fc2_weight_ptr + o[None, :] * HIDDEN + h[:, None]
        fc2 = tl.load(fc2_ptrs, mask=h_valid[:, None] & (o < RESULTS)[None, :], other=0)
        y = tl.dot(hidden.to(x.dtype), fc2, y)
    y += tl.load(fc2_bias_ptr + o, mask=o < RESULTS, other=0).to(tl.float32)[None, :]
    tl.store(y_ptr + r * RESULTS + o[None, :], y, mask=(r < rows) & (o < RESULTS)[None, :])


def has_kernel(x: Tensor, fc2_weight: Tensor) -> bool:
    """Whether the kernel runs for x (..., C) and fc2_weight (C_out, H): in 16 bits, for few channels, from sm_80 on."""
    if max(x.shape[-1], fc2_weight.shape[0]) > MAX_CHANNELS:
        return False
    if not x.is_cuda:  # Triton's interpreter, whose products of bfloat16 are wrong
        return x.dtype == torch.float16
    return x.dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """`dwconv2d.mlp` without its gradient."""
    reference.check_inputs(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if not has_kernel(x, fc2_weight):
        hidden = F.gelu(F.linear(x, fc1_weight, fc1_bias.to(x.dtype)))
        return F.linear(hidden, fc2_weight, fc2_bias.to(x.dtype))
    rows = x.reshape(-1, x.shape[-1])
    channels, (results, hidden) = rows.shape[1], fc2_weight.shape
    y = x.new_empty((*x.shape[:-1], results))
    launch(
        _mlp_kernel,
        triton.cdiv(len(rows), _TILING["BLOCK_R"]),
        *(rows, *(t.contiguous() for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)), y, len(rows), *rows.stride()),
        CHANNELS=channels,
        HIDDEN=hidden,
        RESULTS=results,
        BLOCK_C=max(triton.next_power_of_2(channels), 16),
        BLOCK_O=max(triton.next_power_of_2(results), 16),
        **_TILING,
    )
    return y
