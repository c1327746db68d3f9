"""torch.compile around training and evaluation."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

MODES = ("default", "reduce-overhead", "max-autotune")
WITH_CUDA_GRAPHS = MODES[1:]


def compile_in_place(model: nn.Module, mode: str) -> None:
    """Let calls of `model` go through torch.compile. Its type, parameters and state dict stay what they are.

    Every batch of another size is compiled anew: see `filled`.
    """
    model.compile(mode=mode, dynamic=False)


def is_compiled(model: nn.Module) -> bool:
    return getattr(model, "_compiled_call_impl", None) is not None


def uncompiled(model: nn.Module) -> AbstractContextManager:
    """Calls of `model` run as they are written: what is compiled passes over hooks that were added later."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def begin_step(model: nn.Module) -> None:
    """Before a batch of training: CUDA graphs may now write over what they returned for the last one."""
    if is_compiled(model):
        torch.compiler.cudagraph_mark_step_begin()


def filled(images: Tensor, size: int) -> Tensor:
    """A batch of at least `size`: short ones, as the last of an epoch, have their images repeated."""
    if len(images) >= size:
        return images
    return images[torch.arange(size, device=images.device) % len(images)]
