"""torch.compile around training and evaluation."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

MODES = ("default", "reduce-overhead", "max-autotune")
WITH_CUDA_GRAPHS = MODES[1:]


def compile_in_place(model: nn.Module, mode: str) -> None:
    """Make calls of `model` go through torch.compile; the model's type, parameters and state dict stay the same.

    A batch of a new size is compiled anew; see `filled`.
    """
    model.compile(mode=mode, dynamic=False)


def is_compiled(model: nn.Module) -> bool:
    return getattr(model, "_compiled_call_impl", None) is not None


def uncompiled(model: nn.Module) -> AbstractContextManager:
    """Return a context in which calls of `model` run without compilation; compiled code ignores hooks added later."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def begin_step(model: nn.Module) -> None:
    """Begin a training batch: from now on, CUDA graphs may overwrite the outputs of the previous batch."""
    if is_compiled(model):
        torch.compiler.cudagraph_mark_step_begin()


def filled(images: Tensor, size: int) -> Tensor:
    """Return a batch of at least `size` images; a shorter batch, such as an epoch's last, repeats its images."""
    if len(images) >= size:
        return images
    return images[torch.arange(size, device=images.device) % len(images)]
