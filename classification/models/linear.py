"""Linear layers of tokens by oneDNN, on a CPU in float32. The modules in `cpu.py` call them.

PyTorch multiplies float32 matrices by MKL and convolves by oneDNN. On Intel's processors, MKL is faster, so this module
leaves products to MKL there. On other processors, MKL leaves half of the vector units idle, and oneDNN is faster.
"""

import math
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

CPUINFO = Path("/proc/cpuinfo")


def _on_intel() -> bool:
    """Whether the system says that the processor is Intel's."""
    return "GenuineIntel" in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())


ONEDNN = torch.backends.mkldnn.is_available()
MKL_LEADS = torch.backends.mkl.is_available() and _on_intel()
FEW_NUMBERS = 20_480  # PyTorch computes 1x1 convolutions of at most so many numbers without oneDNN
# Dynamo of PyTorch 2.4 cannot ask whether a transform of torch.func is active; 2.7's can.
SEES_TRANSFORMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
FEW_TOKENS = 128  # with fewer tokens and few output channels, some threads of oneDNN have no work


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for tokens (..., C_in): x weight^T + bias, (..., C_out).

    It calls `F.linear` where oneDNN is not faster, and in graphs of `torch.export` without `strict=True`.
    """
    if MKL_LEADS or weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or not is_product(x, weight, bias):
        return F.linear(x, weight, bias)
    channels_out, channels_in = weight.shape
    if channels_out < channels_in and math.prod(x.shape[:-1]) < FEW_TOKENS:
        return F.linear(x, weight, bias)
    if not torch.compiler.is_dynamo_compiling():
        return _convolve(x, weight, bias)
    if not SEES_TRANSFORMS or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return F.linear(x, weight, bias)  # the transforms know all its derivatives
    return torch.ops.spatialmamba.linear(x, weight, bias)


def is_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` may choose a library for the product: enough numbers, in plain float32 tensors on a CPU.

    PyTorch's own layers handle all other inputs, and report errors.
    """
    if not ONEDNN or x.numel() <= FEW_NUMBERS or torch.is_autocast_enabled("cpu"):
        return False
    if not _is_plain(x) or not _is_plain(weight) or weight.numel() == 0:
        return False
    return bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1])


def _is_plain(t: Tensor) -> bool:
    is_tensor = type(t) is Tensor or type(t) is nn.Parameter  # quantisation and export use subclasses
    return is_tensor and t.device.type == "cpu" and t.dtype == torch.float32 and t.layout == torch.strided


def dilation() -> int:
    """Dilation of a 1x1 convolution: without effect on the result, but on one thread PyTorch needs it to use oneDNN."""
    return 2 if torch.get_num_threads() == 1 else 1


def _plane(tokens: Tensor) -> Tensor:
    """(..., C) -> (1, C, 1, tokens), channels-last."""
    return tokens.reshape(1, 1, -1, tokens.shape[-1]).contiguous().permute(0, 3, 1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(_plane(x), weight[..., None, None], bias, dilation=dilation())
    return y.permute(0, 2, 3, 1).view(*x.shape[:-1], weight.shape[0])


# ----- for torch.compile: an opaque operator. The compiler would change the layout of the tensors around a convolution,
# ----- and copy them.


@torch.library.custom_op("spatialmamba::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _convolve(x, weight, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# An explicit schema: PyTorch 2.4 cannot derive it from the annotation of a list of bools.
@torch.library.custom_op(
    "spatialmamba::linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. A gradient that is not wanted is an empty tensor."""
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *(_plane(grad), _plane(x), weight[..., None, None], weight.shape[:1]),
        *([1, 1], [0, 0], [dilation(), dilation()], False, [0, 0], 1, wanted),
    )
    nothing = x.new_empty(0)
    return (
        grad_x.permute(0, 2, 3, 1).view(x.shape) if wanted[0] else nothing,
        grad_weight.view(weight.shape) if wanted[1] else nothing.clone(),
        grad_bias if wanted[2] else nothing.clone(),
    )


@_linear_backward.register_fake
def _(grad, x, weight, wanted):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _save(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    wanted = list(ctx.needs_input_grad)
    grads = torch.ops.spatialmamba.linear_backward(grad, *ctx.saved_tensors, wanted)
    return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))


_linear.register_autograd(_backward, setup_context=_save)
