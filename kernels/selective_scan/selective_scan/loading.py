"""Loads the compiled kernels, and says which kernels there are."""

import functools
import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_TORCH = "_".join(torch.__version__.split(".")[:2])
_REINSTALL = (
    "pip install --force-reinstall --no-deps PATH/TO/kernels/selective_scan, in the environment that has PyTorch, with "
    "a C++ compiler and, for CUDA kernels, nvcc of PyTorch's CUDA version"
)


def _load_compiled() -> bool:
    """Load the library that setup.py built, if it built one. Its kernels register themselves with the dispatcher."""
    library = _FOLDER / f"_C_torch{_TORCH}.so"
    if not library.exists():
        others = [path.name for path in _FOLDER.glob("_C_torch*.so")]
        if others:
            raise ImportError(
                f"selective_scan has {', '.join(others)} but this is torch {torch.__version__}: {_REINSTALL}"
            )
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"{library} does not load with torch {torch.__version__} ({error}): {_REINSTALL}") from error
    return True


COMPILED = _load_compiled()
COMPILED_FOR_CUDA = COMPILED and torch._C._dispatch_has_kernel_for_dispatch_key(
    "selective_scan::selective_scan_state", "CUDA"
)
TRITON_RUNS_ON_CUDA = not COMPILED_FOR_CUDA and importlib.util.find_spec("triton") is not None


def backends(u: Tensor | None = None) -> dict[str, str]:
    """What can run the operators here: "cpu" and "cuda" are compiled, "triton" and "reference" are Python.

    Maps each name to "available", with detail in brackets, or to why it is not. With a tensor there is one more entry,
    "selected": the name of what runs for tensors on its device.
    """
    gpu = torch.cuda.is_available()
    missing = f"not compiled: {_REINSTALL}"
    found = {
        "cpu": f"available ({torch.backends.cpu.get_cpu_capability()})" if COMPILED else missing,
        "cuda": ("available" if gpu else "compiled, but no GPU is found") if COMPILED_FOR_CUDA else missing,
        "triton": "not installed",
        "reference": "available",
    }
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = "available" if gpu else "installed, but no GPU is found"
    if u is not None:
        found["selected"] = _selected(u.device.type)
    return found


def _selected(device: str) -> str:
    if device == "cpu" and COMPILED:
        return "cpu"
    if device == "cuda" and COMPILED_FOR_CUDA:
        return "cuda"
    return "triton" if device == "cuda" and TRITON_RUNS_ON_CUDA else "reference"


@functools.cache
def warn_of_plain_pytorch(device: str) -> None:
    """Once for each device type that could have had a kernel."""
    if device in ("cpu", "cuda"):
        warnings.warn(f"selective_scan runs as plain PyTorch, slowly, on {device}: {_REINSTALL}", stacklevel=2)
