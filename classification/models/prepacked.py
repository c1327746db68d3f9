"""Inference on a CPU by weights that are cast and packed for oneDNN once. The modules in `cpu.py` call it.

In each call, autocast casts the weights again, and oneDNN brings them into a layout of its own. Here both happen once,
batch norm is folded into the convolution before it, and oneDNN applies GELU and SiLU as it stores a product. It could
apply ReLU too, but would turn NaN into 0.
"""

from collections.abc import Callable
from ctypes import c_char
from operator import is_

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from classification.models.linear import MKL_LEADS

# Operators of Inductor, which a PyTorch with oneDNN has.
OPERATORS = (
    "_is_mkldnn_bf16_supported",
    *("_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise", "_reorder_convolution_weight"),
)


def _supported() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return ()
    bfloat16 = (torch.bfloat16,) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()  # by AVX-512
    return bfloat16 if MKL_LEADS else (*bfloat16, torch.float32)


SUPPORTED = _supported()


def prepacked_dtype(x: Tensor, *weights: Tensor | None) -> torch.dtype | None:
    """Return the dtype in which packed weights compute for x; None if they may not be used.

    They are used for inference on a CPU in bfloat16, by autocast or by a model in bfloat16, and in float32 where oneDNN
    is faster than MKL.
    """
    # This runs for each layer in each call, so what is most often decisive comes first.
    if torch.is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling() or not SUPPORTED:
        return None
    dtypes = (x.dtype,)
    if torch.is_autocast_enabled("cpu"):
        dtypes = (torch.get_autocast_dtype("cpu"), torch.float32)
    if dtypes[0] not in SUPPORTED or not _is_plain(x, dtypes) or x.dim() < 2 or x.numel() == 0 or _is_observed():
        return None
    for weight in weights:
        if weight is not None and not (type(weight) is nn.Parameter and _is_plain(weight, dtypes) and _counts(weight)):
            return None
    return dtypes[0]


def _is_plain(t: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    return t.dtype in dtypes and t.device.type == "cpu" and t.layout == torch.strided


def _counts(weight: Tensor) -> bool:
    """Whether a weight has memory, and PyTorch counts its changes, which it does not if made in inference mode."""
    return weight.data_ptr() != 0 and not weight.is_inference()


def _is_observed() -> bool:
    """Whether PyTorch traces, transforms or counts what is called: it knows no packed weights."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0:
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None


class Steps:
    """Counts the steps of all optimizers in the process: those with `fused=True` do not count a weight's changes."""

    def __init__(self):
        self.made, self.hook = 0, None

    def count(self) -> None:
        """Count from now on."""
        if self.hook is None:
            self.hook = register_optimizer_step_post_hook(self._add)

    def _add(self, *_: object) -> None:
        self.made += 1


steps = Steps()


class Kept(dict):
    """The packed weights of a module. Deep copies and files of the module have none."""

    def __deepcopy__(self, memo: dict) -> "Kept":
        return Kept()

    def __reduce__(self) -> tuple:
        return Kept, ()


class Prepacked(nn.Module):
    """Holds packed weights until one of the tensors that they are made of changes.

    A change by an in-place operation, by an optimizer or by `load_state_dict` is seen. PyTorch does not count changes
    through `.data`, NumPy, `torch.distributed`, or another tensor or process that shares the memory. These are seen if
    they reach the first, middle or last 64 bytes of a tensor, and all once `train()` or `eval()` of this module is
    called.
    """

    def prepacked(self, name: object, make: Callable[[], tuple], *sources: Tensor | None) -> tuple:
        """Return what `make` returned for these sources, or call it if one has changed since."""
        sources = [one for one in sources if one is not None]
        kept = self.kept(name, sources)
        return self.keep(name, make, sources) if kept is None else kept

    def kept(self, name: object, sources: list[Tensor]) -> tuple | None:
        """Return what was made of these sources; None if nothing was, or if one has changed since."""
        entry = self.__dict__.get("_prepacked", {}).get(name)
        return entry[2] if entry and entry[0] == steps.made and entry[1].shows(sources) else None

    def keep(self, name: object, make: Callable[[], tuple], sources: list[Tensor]) -> tuple:
        """Return what `make` makes of the sources, and keep it, unless PyTorch does not count a source's changes."""
        counted = not any(one.is_inference() for one in sources)  # not of batch norm's buffers, for example
        steps.count()  # here, because a model may come from a file or another process
        # Look first: what another thread changes meanwhile is then seen in the next call.
        before = (steps.made, Snapshot(sources)) if counted else ()
        with torch.autocast("cpu", enabled=False):
            made = make()
        if before:
            self.__dict__.setdefault("_prepacked", Kept())[name] = (*before, made)
        return made

    def train(self, mode: bool = True) -> "Prepacked":
        self.__dict__.pop("_prepacked", None)
        return super().train(mode)


SAMPLED = 64  # bytes


class Snapshot:
    """What tensors were, to see later whether they are the same. It takes few calls, for each inference compares it."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.versions = [(one._version, one.dtype) for one in tensors]
        self.addresses = [one.data_ptr() for one in tensors]
        # These keep the memory, too, so that no other tensor gets its address.
        self.aliases = [one.detach() for one in tensors]
        self.samples = [sample for one in tensors for sample in _samples(one)]
        self.sampled = b"".join(self.samples)

    def shows(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same tensors, in the same memory, with the same versions, dtypes and samples."""
        return (
            len(tensors) == len(self.tensors)
            and all(map(is_, tensors, self.tensors))
            and [(one._version, one.dtype) for one in tensors] == self.versions
            and [one.data_ptr() for one in tensors] == self.addresses  # before samples are read: it may be freed
            and all(map(Tensor.is_set_to, tensors, self.aliases))
            and b"".join(self.samples) == self.sampled
        )


def _samples(t: Tensor) -> list[memoryview]:
    """Return views of the memory of the first, middle and last numbers of a tensor."""
    dense = t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
    size = (t.numel() if dense else 1) * t.element_size()
    length, start = min(SAMPLED, size), t.data_ptr()
    offsets = {0, (size - length) // 2, size - length}
    return [memoryview((c_char * length).from_address(start + offset)) for offset in offsets]


def pack(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cast a weight (C_out, C_in) and a bias, and pack the weight for products of tokens as many as x has."""
    tokens = x.numel() // x.shape[-1]
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous(), tokens)
    return packed, _dense(bias, dtype)


def _dense(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast a bias. oneDNN reads one with gaps, as of a slice, as if it had none."""
    return None if bias is None else bias.detach().to(dtype).contiguous()


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """x weight^T + bias of tokens (..., C_in), and then "none", "gelu" or "swish", which is SiLU.

    x must have the dtype of the weight.
    """
    # GELU's argument "none" means that it is exact, not by tanh.
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], "none" if then == "gelu" else "")


ONCE, SAME = [1, 1], [1, 1]  # stride or dilation, and padding of a 3x3 kernel


def pack_depthwise(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cast and pack a depthwise 3x3 kernel (C, 1, 3, 3) for planes x (B, C, H, W)."""
    geometry = (SAME, ONCE, ONCE, x.shape[1])
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach().to(dtype), *geometry, list(x.shape))
    return packed, _dense(bias, dtype)


def depthwise(x: Tensor, packed: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    """The depthwise 3x3 convolution of planes laid out as tokens, and then "none" or "swish", which is SiLU."""
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, SAME, ONCE, ONCE, x.shape[1], then, [], "")


def folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return float32 weight and bias of a convolution with the batch norm after it, if it is one, folded in."""
    weight, bias = conv.weight.detach().float(), None if conv.bias is None else conv.bias.detach().float()
    if not isinstance(norm, nn.BatchNorm2d):
        return weight, bias
    scale = norm.weight.detach().float() * (norm.running_var.float() + norm.eps).rsqrt()
    mean = norm.running_mean.float() if bias is None else norm.running_mean.float() - bias
    return weight * scale[:, None, None, None], norm.bias.detach().float() - mean * scale
