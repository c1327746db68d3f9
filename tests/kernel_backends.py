"""Runs the operators of a kernel package on one of its backends, for the tests that every backend must pass."""

import contextlib
import importlib
import inspect
from collections.abc import Iterator

import torch

GPU = torch.cuda.is_available()
# Older PyTorches override without being told.
OVERRIDE = (
    {"allow_override": True} if "allow_override" in inspect.signature(torch.library.Library.impl).parameters else {}
)
BACKENDS = ["cpu", "reference", *(["cuda", "reference_on_cuda"] if GPU else []), "triton"]


@contextlib.contextmanager
def running_on(backend: str, package: str) -> Iterator[None]:
    """Compiled kernels and Triton on a GPU run there, tensors being made there by default; all else on the CPU.

    Without a GPU, Triton's kernels run in its interpreter.
    """
    device = "cuda" if backend in ("cuda", "reference_on_cuda") or (backend == "triton" and GPU) else "cpu"
    loading = importlib.import_module(f"{package}.loading")
    with torch.device(device):
        if backend in ("cpu", "cuda"):
            state = loading.backends()[backend]
            assert state.startswith("available"), f"{package}: {backend} kernels are {state}; make install"
            yield
            return
        if interpreted(backend):
            from interpreter import quicken

            quicken()
        library = torch.library.Library(package, "IMPL")
        for name, kernels in loading.OPERATORS.items():
            kernel = kernels.in_triton() if backend == "triton" else kernels.plain
            library.impl(name, loading.without_autocast(kernel), device.upper(), **OVERRIDE)
        yield
        library._destroy()


def interpreted(backend: str) -> bool:
    """Whether a program takes a tenth of a second, and sizes must be small."""
    return backend == "triton" and not GPU
