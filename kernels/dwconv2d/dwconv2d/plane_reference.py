"""The operators on planes in plain PyTorch: the specification, and the kernels for devices without their own.

In shapes, B is the batch, D the channels and N the states. As an argument, D is the skip weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

# The kernels have these numbers built in: csrc/cpu (planes.cpp, planes_kernel.h, fusion_rows.h), csrc/cuda (plan.h,
# taps.cuh, direct_kernel.cuh) and plane_triton.py. So has kernels/benchmark.py.
DILATIONS = (1, 3, 5)
PADDING_MODES = ("replicate", "zeros")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ----- argument checks, shared with the fake kernels


def check_conv_inputs(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, padding_mode: str) -> None:
    """Raise a ValueError or TypeError that names the first argument of `dilated_dwconv2d` that does not fit."""
    _check_dense(x, "x")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"x must be (batch, channels, height, width), where only batch may be 0, got shape {tuple(x.shape)}"
        )
    channels = x.shape[1]
    kernel = weight.shape[2:]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or any(k % 2 == 0 for k in kernel):
        raise ValueError(
            f"weight must be (channels={channels}, 1, kernel height, kernel width) with an odd kernel, "
            f"got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be (channels={channels},), got shape {tuple(bias.shape)}")
    if dilation < 1 or dilation * (max(kernel) // 2) >= 2**31:
        raise ValueError(f"dilation must be at least 1, with all taps less than 2^31 away, got {dilation}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
    _check_float(x, "x")
    _check_like(x, "x", x.dtype, weight=weight, bias=bias)


def check_fusion_inputs(h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor) -> None:
    """Raise a ValueError or TypeError that names the first argument of `state_fusion` that does not fit."""
    _check_dense(h, "h")
    if h.dim() not in (4, 5) or 0 in h.shape[1:]:
        raise ValueError(
            "h must be (batch, channels, height, width) or (batch, channels, states, height, width), "
            f"where only batch may be 0, got shape {tuple(h.shape)}"
        )
    weights = {"weight3": weight3, "weight3_d3": weight3_d3, "weight3_d5": weight3_d5}
    for name, weight in weights.items():
        if weight.shape != (h.shape[1], 1, 3, 3):
            raise ValueError(f"{name} must be (channels={h.shape[1]}, 1, 3, 3), got shape {tuple(weight.shape)}")
    if alpha.shape != (len(DILATIONS),):
        raise ValueError(f"alpha must be ({len(DILATIONS)},), got shape {tuple(alpha.shape)}")
    if h.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"h must be float32 or float64, states are never 16-bit, got {h.dtype}")
    _check_like(h, "h", h.dtype, **weights, alpha=alpha)


def check_output_inputs(
    h: Tensor,
    weight3: Tensor,
    weight3_d3: Tensor,
    weight3_d5: Tensor,
    alpha: Tensor,
    C: Tensor,
    D: Tensor,
    x: Tensor,
) -> None:
    """Raise a ValueError or TypeError that names the first argument of `state_fusion_output` that does not fit."""
    check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha)
    batch, channels, *states, height, width = h.shape
    n = states[0] if states else 1
    if C.shape != (batch, n, height, width):
        raise ValueError(
            f"C must be (batch={batch}, states={n}, height={height}, width={width}), got shape {tuple(C.shape)}"
        )
    if D.shape != (channels,):
        raise ValueError(f"D must be (channels={channels},), got shape {tuple(D.shape)}")
    if x.shape != (batch, channels, height, width):
        raise ValueError(
            f"x must be (batch={batch}, channels={channels}, height={height}, width={width}), "
            f"got shape {tuple(x.shape)}"
        )
    _check_float(x, "x")
    if (x.dtype == torch.float64) != (h.dtype == torch.float64):
        raise TypeError(f"x must be float64 exactly if h is, got {x.dtype} with {h.dtype} states")
    _check_like(h, "h", h.dtype, D=D)
    _check_like(x, "x", x.dtype, C=C)
    _check_like(h, "h", x.dtype, x=x)


def check_grad(grad: Tensor, like: Tensor) -> None:
    """Raise a ValueError or TypeError if `grad` does not have the shape, dtype and device of the result."""
    if grad.shape != like.shape:
        raise ValueError(f"grad must be {tuple(like.shape)}, got shape {tuple(grad.shape)}")
    _check_like(like, "the result", like.dtype, grad=grad)


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of results that are laid out as x: channels-last if x is, else contiguous."""
    return suggest_memory_format(x)


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def _check_float(x: Tensor, name: str) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_like(reference: Tensor, reference_name: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _check_dense(tensor, name)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} when {reference_name} is {reference.dtype}, got {tensor.dtype}")
        if tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device} but {reference_name} is on {reference.device}")


# ----- one depthwise convolution that keeps the plane's size


def dilated_dwconv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1, padding_mode: str = "replicate"
) -> Tensor:
    """`dwconv2d.dilated_dwconv2d` without its gradient."""
    check_conv_inputs(x, weight, bias, dilation, padding_mode)
    compute = torch.promote_types(x.dtype, torch.float32)
    dilation = min(dilation, max(x.shape[2:]))  # larger dilations give the same result
    bias = None if bias is None else bias.to(compute)
    y = _conv(x.to(compute), weight.to(compute), dilation, padding_mode, bias)
    return _laid_out_as(y.to(x.dtype), x)


def dilated_dwconv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, padding_mode: str = "replicate"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `dilated_dwconv2d` for x, weight and bias, even if there is no bias, from `grad` of y."""
    check_conv_inputs(x, weight, None, dilation, padding_mode)
    check_grad(grad, x)
    compute = torch.promote_types(x.dtype, torch.float32)
    dilation = min(dilation, max(x.shape[2:]))
    margins = _margins(weight.shape[2:], dilation)
    grad = grad.to(compute)
    padded = _pad(x.to(compute), margins, padding_mode)
    grad_x = _conv_adjoint(grad, weight.to(compute), dilation, padding_mode).to(x.dtype)
    grad_weight = _weight_grad(grad, padded, margins, weight.shape[2:], dilation)
    return _laid_out_as(grad_x, x), grad_weight.to(weight.dtype), grad.sum((0, 2, 3)).to(weight.dtype)


def _conv(x: Tensor, weight: Tensor, dilation: int, padding_mode: str, bias: Tensor | None = None) -> Tensor:
    margins = _margins(weight.shape[2:], dilation)
    if padding_mode == "zeros":
        return F.conv2d(x, weight, bias, padding=margins, dilation=dilation, groups=x.shape[1])
    padded = _pad(x, margins, padding_mode)
    return F.conv2d(padded, weight, bias, dilation=dilation, groups=x.shape[1])


def _conv_adjoint(grad: Tensor, weight: Tensor, dilation: int, padding_mode: str) -> Tensor:
    """The transpose of `_conv` as a function of x."""
    grad_padded = F.conv_transpose2d(_channels_last(grad), weight, dilation=dilation, groups=grad.shape[1])
    return _pad_adjoint(grad_padded, _margins(weight.shape[2:], dilation), padding_mode)


def _weight_grad(
    grad: Tensor, padded: Tensor, margins: tuple[int, int], kernel: tuple[int, int], dilation: int
) -> Tensor:
    """Sum over images and positions p of grad(p) padded(p + tap), for each tap of a kernel: (D, 1, kh, kw).

    `padded` may have wider margins than the kernel needs.
    """
    channels, height, width = grad.shape[1:]
    # Innermost channels and one buffer: conv2d_weight is three to ten times slower on the small planes of late stages.
    grad, padded = grad.permute(0, 2, 3, 1).contiguous(), padded.permute(0, 2, 3, 1).contiguous()
    product = torch.empty_like(grad)
    top, left = (m - n for m, n in zip(margins, _margins(kernel, dilation), strict=True))
    out = grad.new_empty((channels, 1, *kernel))
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            y, x = top + i * dilation, left + j * dilation
            torch.mul(grad, padded[:, y : y + height, x : x + width], out=product)
            out[:, 0, i, j] = product.sum((0, 1, 2))
    return out


def _laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    return y.contiguous(memory_format=memory_format(x))


def _margins(kernel: tuple[int, int], dilation: int) -> tuple[int, int]:
    return dilation * (kernel[0] // 2), dilation * (kernel[1] // 2)


def _channels_last(x: Tensor) -> Tensor:
    # This is not .contiguous(), which on a plane of one pixel keeps strides for which PyTorch picks slow kernels.
    return x.to(memory_format=torch.channels_last)


def _pad(x: Tensor, margins: tuple[int, int], padding_mode: str) -> Tensor:
    rows, columns = margins
    replicate = padding_mode == "replicate" and x.shape[0] > 0  # F.pad refuses to replicate an empty batch
    return F.pad(_channels_last(x), (columns, columns, rows, rows), mode="replicate" if replicate else "constant")


def _pad_adjoint(grad: Tensor, margins: tuple[int, int], padding_mode: str) -> Tensor:
    """The transpose of `_pad`: replicate padding adds each margin's gradient to the border it was copied from."""
    rows, columns = margins
    height, width = grad.shape[2] - 2 * rows, grad.shape[3] - 2 * columns
    inner = grad[:, :, rows : rows + height].clone()
    if padding_mode == "replicate":
        inner[:, :, 0] += grad[:, :, :rows].sum(2)
        inner[:, :, -1] += grad[:, :, rows + height :].sum(2)
    out = inner[..., columns : columns + width].clone()
    if padding_mode == "replicate":
        out[..., 0] += inner[..., :columns].sum(-1)
        out[..., -1] += inner[..., columns + width :].sum(-1)
    return out


# ----- state fusion


def state_fusion(h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor) -> Tensor:
    """`dwconv2d.state_fusion` without its gradient."""
    check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha)
    planes = _merge_states(h)
    fused = torch.zeros_like(planes)
    for weight, a, dilation in zip((weight3, weight3_d3, weight3_d5), alpha, DILATIONS, strict=True):
        fused += _conv(planes, a * weight, dilation, "replicate")
    return _split_states(fused, h.shape)


def state_fusion_backward(
    grad: Tensor, h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `state_fusion` for h, the three kernels and alpha, from `grad` of the fused states."""
    check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha)
    check_grad(grad, h)
    weights = (weight3, weight3_d3, weight3_d5)
    grad = _merge_states(grad)
    grad_h = _conv_adjoint(grad, _merge_taps(weights, alpha), 1, "replicate")
    margins = (max(DILATIONS), max(DILATIONS))
    padded = _pad(_merge_states(h), margins, "replicate")
    grad_scaled = [_weight_grad(grad, padded, margins, (3, 3), dilation) for dilation in DILATIONS]
    grad_weights = [a * g for a, g in zip(alpha, grad_scaled, strict=True)]
    grad_alpha = torch.stack([(w * g).sum() for w, g in zip(weights, grad_scaled, strict=True)])
    return _split_states(grad_h, h.shape), *grad_weights, grad_alpha


def _merge_taps(weights: tuple[Tensor, ...], alpha: Tensor) -> Tensor:
    """Merge the three dilated kernels into one, (D, 1, 11, 11), with 25 taps: one adjoint instead of three."""
    reach = max(DILATIONS)
    merged = weights[0].new_zeros((weights[0].shape[0], 1, 2 * reach + 1, 2 * reach + 1))
    for weight, a, dilation in zip(weights, alpha, DILATIONS, strict=True):
        taps = slice(reach - dilation, reach + dilation + 1, dilation)
        merged[:, :, taps, taps] += a * weight
    return merged


def _merge_states(h: Tensor) -> Tensor:
    """(B, D, H, W) or (B, D, N, H, W) -> (B N, D, H, W), channels-last: the states of a channel share its kernels."""
    return _channels_last(h if h.dim() == 4 else h.transpose(1, 2).flatten(0, 1))


def _split_states(planes: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint of `_merge_states`, contiguous in `shape`."""
    if len(shape) == 5:
        planes = planes.unflatten(0, (shape[0], shape[2])).transpose(1, 2)
    return planes.contiguous()


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
    check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x)
    fused = _with_states(state_fusion(h, weight3, weight3_d3, weight3_d5, alpha))
    y = (fused * C.to(h.dtype).unsqueeze(1)).sum(2) + D[:, None, None] * x.to(h.dtype)
    return _laid_out_as(y.to(x.dtype), x)


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
    check_output_inputs(h, weight3, weight3_d3, weight3_d5, alpha, C, D, x)
    check_grad(grad, x)
    weights = (weight3, weight3_d3, weight3_d5, alpha)
    grad = grad.to(h.dtype)
    fused = _with_states(state_fusion(h, *weights))
    grad_C = (grad.unsqueeze(2) * fused).sum(1).to(C.dtype).contiguous()
    grad_D = (grad * x).sum((0, 2, 3))
    grad_x = _laid_out_as((grad * D[:, None, None]).to(x.dtype), x)
    grad_fused = (grad.unsqueeze(2) * C.to(h.dtype).unsqueeze(1)).reshape(h.shape)
    return *state_fusion_backward(grad_fused, h, *weights), grad_C, grad_D, grad_x


def _with_states(h: Tensor) -> Tensor:
    return h.unsqueeze(2) if h.dim() == 4 else h
