"""Linear layers of tokens, and 1x1 convolutions, which are the same: on a CPU, in float32, both by oneDNN.

PyTorch multiplies float32 matrices by MKL, which on processors that are not Intel's leaves half of their vector units
idle, and convolves by oneDNN, which does not.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()
FEW_NUMBERS = 20_480  # so many or less PyTorch does not have oneDNN convolve
FEW_TOKENS = 128  # to fewer, oneDNN gives only some of its threads work, unless there are channels to share


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for tokens (..., C_in): x weight^T + bias, (..., C_out)."""
    channels_out, channels_in = weight.shape
    if not by_onednn(x) or x.shape[-1] != channels_in or x.numel() <= FEW_NUMBERS:
        return F.linear(x, weight, bias)
    if channels_out < channels_in and math.prod(x.shape[:-1]) < FEW_TOKENS:
        return F.linear(x, weight, bias)
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.spatialmamba.linear(x, weight, bias)
    return _convolve(x, weight, bias)


def by_onednn(x: Tensor) -> bool:
    """Whether `linear` of x may be a convolution; never in an exported graph, which should say what is meant."""
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()  # which says yes to both
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return ONEDNN and on_cpu and not exporting


def dilation() -> int:
    """Of a single tap, so without effect, but on one thread PyTorch convolves 1x1 by oneDNN only if there is one."""
    return 2 if torch.get_num_threads() == 1 else 1


class Linear(nn.Linear):
    """`nn.Linear`, applied by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class PointwiseConv2d(nn.Conv2d):
    """1x1 convolution of planes (B, C, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not by_onednn(x):
            return super().forward(x)
        if torch.compiler.is_dynamo_compiling():
            return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight, self.bias, dilation=dilation())


def _plane(tokens: Tensor) -> Tensor:
    """(..., C) -> (1, C, 1, tokens), channels-last."""
    return tokens.reshape(1, 1, -1, tokens.shape[-1]).contiguous().permute(0, 3, 1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(_plane(x), weight[..., None, None], bias, dilation=dilation())
    return y.permute(0, 2, 3, 1).view(*x.shape[:-1], weight.shape[0])


# ----- for torch.compile: as an operator that it does not look into, for it would lay out what surrounds a convolution
# ----- as it thinks best for that, and copy


@torch.library.custom_op("spatialmamba::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _convolve(x, weight, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("spatialmamba::linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *(_plane(grad), _plane(x), weight[..., None, None], weight.shape[:1]),
        *([1, 1], [0, 0], [dilation(), dilation()], False, [0, 0], 1, [True, True, True]),
    )
    return grad_x.permute(0, 2, 3, 1).view(x.shape), grad_weight.view(weight.shape), grad_bias


@_linear_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _save(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad):
    grad_x, grad_weight, grad_bias = torch.ops.spatialmamba.linear_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None


_linear.register_autograd(_backward, setup_context=_save)
