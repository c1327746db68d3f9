"""The operators in plain PyTorch: the specification, and the kernels of any device without its own."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

DILATIONS = (1, 3, 5)
PADDING_MODES = ("replicate", "zeros")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ----- argument checks, shared with the fake kernels


def check_conv_inputs(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, padding_mode: str) -> None:
    """Raise a ValueError or TypeError that names the first argument of `dilated_dwconv2d` that does not fit."""
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (batch, channels, height, width), none but batch 0, got shape {tuple(x.shape)}")
    channels = x.shape[1]
    kernel = weight.shape[2:]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or any(k % 2 == 0 for k in kernel):
        raise ValueError(
            f"weight must be (channels={channels}, 1, kernel height, kernel width) with an odd kernel, "
            f"got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be (channels={channels},), got shape {tuple(bias.shape)}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
    _check_float(x, "x")
    _check_like(x, "x", x.dtype, weight=weight, bias=bias)


def check_fusion_inputs(h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor) -> None:
    """Raise a ValueError or TypeError that names the first argument of `state_fusion` that does not fit."""
    if h.dim() not in (4, 5) or 0 in h.shape[1:]:
        raise ValueError(
            "h must be (batch, channels, height, width) or (batch, channels, states, height, width), "
            f"none but batch 0, got shape {tuple(h.shape)}"
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


def _check_float(x: Tensor, name: str) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_like(reference: Tensor, reference_name: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
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
    bias = None if bias is None else bias.to(compute)
    y = _conv(x.to(compute), weight.to(compute), dilation, padding_mode, bias)
    return y.to(x.dtype).contiguous()


def dilated_dwconv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, dilation: int = 1, padding_mode: str = "replicate"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `dilated_dwconv2d` for x, weight and bias (whether or not there is one), from `grad` of y."""
    check_conv_inputs(x, weight, None, dilation, padding_mode)
    compute = torch.promote_types(x.dtype, torch.float32)
    grad = grad.to(compute)
    grad_x, grad_weight = _conv_backward(grad, x.to(compute), weight.to(compute), dilation, padding_mode)
    grad_x = grad_x.to(x.dtype).contiguous()
    return grad_x, grad_weight.to(weight.dtype).contiguous(), grad.sum((0, 2, 3)).to(weight.dtype)


def _conv(x: Tensor, weight: Tensor, dilation: int, padding_mode: str, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(_pad(x, weight, dilation, padding_mode), weight, bias, dilation=dilation, groups=x.shape[1])


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, dilation: int, padding_mode: str) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:  # conv2d_weight refuses an empty batch
        return torch.empty_like(x), torch.zeros_like(weight)
    channels = x.shape[1]
    grad_padded = F.conv_transpose2d(grad, weight, dilation=dilation, groups=channels)
    padded = _pad(x, weight, dilation, padding_mode)
    grad_weight = conv2d_weight(padded, weight.shape, grad, dilation=dilation, groups=channels)
    return _pad_adjoint(grad_padded, *_margins(weight, dilation), padding_mode), grad_weight


def _margins(weight: Tensor, dilation: int) -> tuple[int, int]:
    return dilation * (weight.shape[2] // 2), dilation * (weight.shape[3] // 2)


def _pad(x: Tensor, weight: Tensor, dilation: int, padding_mode: str) -> Tensor:
    rows, columns = _margins(weight, dilation)
    mode = "replicate" if padding_mode == "replicate" else "constant"
    if mode == "replicate" and x.shape[0] == 0:  # F.pad refuses an empty batch
        mode = "constant"
    return F.pad(x, (columns, columns, rows, rows), mode=mode)


def _pad_adjoint(grad: Tensor, rows: int, columns: int, padding_mode: str) -> Tensor:
    """The transpose of `_pad`: replicate padding adds each margin's gradient to the border it was copied from."""
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
    planes = _fold_states(h)
    fused = torch.zeros_like(planes)
    for weight, a, dilation in zip((weight3, weight3_d3, weight3_d5), alpha, DILATIONS, strict=True):
        fused += _conv(planes, a * weight, dilation, "replicate")
    return _unfold_states(fused, h.shape)


def state_fusion_backward(
    grad: Tensor, h: Tensor, weight3: Tensor, weight3_d3: Tensor, weight3_d5: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `state_fusion` for h, the three kernels and alpha, from `grad` of the fused states."""
    check_fusion_inputs(h, weight3, weight3_d3, weight3_d5, alpha)
    planes, grad = _fold_states(h), _fold_states(grad)
    grad_h = torch.zeros_like(planes)
    grad_weights, grad_alphas = [], []
    for weight, a, dilation in zip((weight3, weight3_d3, weight3_d5), alpha, DILATIONS, strict=True):
        grad_planes, grad_scaled = _conv_backward(grad, planes, a * weight, dilation, "replicate")
        grad_h += grad_planes
        grad_weights.append((a * grad_scaled).contiguous())
        grad_alphas.append((weight * grad_scaled).sum())
    return _unfold_states(grad_h, h.shape), *grad_weights, torch.stack(grad_alphas)


def _fold_states(h: Tensor) -> Tensor:
    """(B, D, H, W) or (B, D, N, H, W) -> contiguous (B N, D, H, W): every state of a channel has its kernels."""
    return h.contiguous() if h.dim() == 4 else h.transpose(1, 2).flatten(0, 1).contiguous()


def _unfold_states(planes: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) == 4:
        return planes
    batch, channels, n, height, width = shape
    return planes.view(batch, n, channels, height, width).transpose(1, 2).contiguous()


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
    return y.to(x.dtype).contiguous()


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
    weights = (weight3, weight3_d3, weight3_d5, alpha)
    grad = grad.to(h.dtype)
    fused = _with_states(state_fusion(h, *weights))
    grad_C = (grad.unsqueeze(2) * fused).sum(1).to(C.dtype).contiguous()
    grad_D = (grad * x).sum((0, 2, 3))
    grad_x = (grad * D[:, None, None]).to(x.dtype).contiguous()
    grad_fused = (grad.unsqueeze(2) * C.to(h.dtype).unsqueeze(1)).reshape(h.shape)
    return *state_fusion_backward(grad_fused, h, *weights), grad_C, grad_D, grad_x


def _with_states(h: Tensor) -> Tensor:
    return h.unsqueeze(2) if h.dim() == 4 else h
