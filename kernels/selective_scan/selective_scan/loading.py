"""Loads the compiled kernels, reports which kernels there are, and registers the kernels in Python.

selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

PACKAGE = __name__.partition(".")[0]
_FOLDER = Path(__file__).parent
_TORCH = "_".join(torch.__version__.split(".")[:2])
_REINSTALL = (
    f"pip install --force-reinstall --no-deps PATH/TO/kernels/{PACKAGE}, in the environment that has PyTorch, with "
    "a C++ compiler and, for CUDA kernels, nvcc of PyTorch's CUDA version"
)
if tuple(map(int, _TORCH.split("_"))) < (2, 4):
    raise ImportError(f"{PACKAGE} needs PyTorch 2.4 or newer, this is {torch.__version__}: pip install --upgrade torch")


def _load_compiled() -> bool:
    """Load the library that setup.py built, if it built one. Its kernels register themselves with the dispatcher."""
    library = _FOLDER / f"_C_torch{_TORCH}.so"
    if not library.exists():
        others = [path.name for path in _FOLDER.glob("_C_torch*.so")]
        if others:
            raise ImportError(f"{PACKAGE} has {', '.join(others)} but this is torch {torch.__version__}: {_REINSTALL}")
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"{library} does not load with torch {torch.__version__} ({error}): {_REINSTALL}") from error
    return True


COMPILED = _load_compiled()
COMPILED_FOR_CUDA = COMPILED and any(
    name.startswith(f"{PACKAGE}::") for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _not_compiled(part: str) -> str:
    """Say that "cpu" or "cuda" is not compiled, with the reason if setup.py has written one."""
    note = _FOLDER / "_not_compiled.txt"
    reasons = dict(line.split(": ", 1) for line in note.read_text().splitlines()) if note.exists() else {}
    return f"not compiled{f' ({reasons[part]})' if part in reasons else ''}: {_REINSTALL}"


def backends(tensor: Tensor | None = None) -> dict[str, str]:
    """What can run the operators here: "cpu" and "cuda" are compiled, "triton" and "reference" are Python.

    The result maps each name to "available", with detail in brackets, or to the reason why it is not available. With a
    tensor, "selected" is the name of what runs for tensors on its device, and "selected for NAME" is the same for each
    operator that has no compiled kernels. Triton's `dwconv2d.mlp` calls PyTorch's layers where it has no kernel.
    """
    gpu = torch.cuda.is_available()
    found = {
        "cpu": f"available ({torch.backends.cpu.get_cpu_capability()})" if COMPILED else _not_compiled("cpu"),
        "cuda": _not_compiled("cuda"),
        "triton": "not installed",
        "reference": "available",
    }
    if COMPILED_FOR_CUDA:
        found["cuda"] = "available" if gpu else "compiled, but no GPU is found"
    if TRITON_INSTALLED:
        found["triton"] = "available" if gpu else "installed, but no GPU is found"
    if tensor is not None:
        device = tensor.device.type
        found["selected"] = _selected(device)
        uncompiled = "triton" if device == "cuda" and TRITON_INSTALLED else "reference"
        names = (n for n, i in OPERATORS.items() if not i.has_compiled_kernels and not n.endswith("_backward"))
        found |= {f"selected for {name}": uncompiled for name in names}
    return found


def _selected(device: str) -> str:
    if device == "cpu" and COMPILED:
        return "cpu"
    if device == "cuda" and COMPILED_FOR_CUDA:
        return "cuda"
    return "triton" if device == "cuda" and TRITON_INSTALLED else "reference"


def autocast_dtype(activation: Tensor) -> torch.dtype | None:
    """Autocast's dtype for activations, or None if autocast is off or the activation is float64 or on meta."""
    device = activation.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled and activation.dtype != torch.float64 else None


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast floating-point tensors of at most 32 bits, as autocast does. The checks refuse other dtypes."""
    if tensor.dtype == dtype:  # faster than `to`, which returns the same tensor
        return tensor
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def check_tensors(**tensors: Tensor) -> None:
    """Raise a TypeError that names the first argument that is not a dense tensor.

    A tangent of forward-mode differentiation raises a NotImplementedError, because PyTorch would treat it as zero.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    # Dynamo's tensors do not tell their tangents; without the graph, this is run once more.
    hidden = torch.compiler.is_compiling()
    if forward_ad._current_level >= 0 and (
        hidden or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors.values())
    ):
        raise NotImplementedError(f"the operators of {PACKAGE} have no forward-mode derivative (jvp): use reverse mode")


def without_autocast(kernel: Callable) -> Callable:
    """Run a kernel with autocast off. PyTorch leaves it on inside a kernel, but the kernel chooses its own dtypes."""

    @functools.wraps(kernel)
    def run(*args, **kwargs):
        with torch._C._DisableAutocast():  # takes less host time than `torch.autocast`
            return kernel(*args, **kwargs)

    return run


@functools.cache
def _warn_of_plain_pytorch(device: str, has_compiled_kernels: bool) -> None:
    """Warn once for each device type that could have a kernel, and for each way to get that kernel."""
    if device == "cuda" or (device == "cpu" and has_compiled_kernels):
        how = _REINSTALL if has_compiled_kernels else "pip install triton"
        warnings.warn(f"{PACKAGE} runs as plain PyTorch, slowly, on {device}: {how}", stacklevel=2)


class Implementations(NamedTuple):
    """The implementations of an operator in Python, and whether it has others."""

    plain: Callable  # in plain PyTorch
    triton_module: str  # module of this package with Triton's function of the same name
    # True if csrc/cpu and csrc/cuda have this operator. If false, csrc/autograd.cpp may still have its gradient.
    has_compiled_kernels: bool

    def in_triton(self) -> Callable:
        # Imported here, because a process on a CPU need not import Triton.
        return _attribute(self.triton_module, self.plain.__name__)


@functools.cache
def _attribute(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)


def _plain(implementations: Implementations) -> Callable:
    @functools.wraps(implementations.plain)
    def run(first: Tensor, *args, **kwargs):
        result = implementations.plain(first, *args, **kwargs)  # first: if it raises, there is no warning
        _warn_of_plain_pytorch(first.device.type, implementations.has_compiled_kernels)
        return result

    return without_autocast(run)


def _triton(implementations: Implementations) -> Callable:
    def run(*args, **kwargs):
        return implementations.in_triton()(*args, **kwargs)

    return without_autocast(run)


OPERATORS: dict[str, Implementations] = {}  # all registered operators, by name


def register(plain: Callable, *, triton_module: str, has_compiled_kernels: bool) -> None:
    """Register `plain`, plain PyTorch, as the operator of its name on every device without a compiled kernel.

    On GPUs, Triton's kernel, which is the function of that name in `triton_module`, takes precedence. If the package is
    compiled for CUDA and `has_compiled_kernels`, neither is registered for GPUs: every GPU then takes the CUDA kernel.
    """
    implementations = OPERATORS[plain.__name__] = Implementations(plain, triton_module, has_compiled_kernels)
    operator = f"{PACKAGE}::{plain.__name__}"
    torch.library.impl(operator, "default", _plain(implementations))
    if TRITON_INSTALLED and not (has_compiled_kernels and COMPILED_FOR_CUDA):
        torch.library.impl(operator, "cuda", _triton(implementations))


FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}  # by name of the operator, for transforms of torch.func


def call(name: str, *inputs: object) -> Tensor | tuple[Tensor, ...]:
    """Call an operator or, under a transform of torch.func such as `grad` and `vmap`, its function in `FUNCTIONS`.

    These transforms support neither gradients in C++ nor those of `torch.library.register_autograd`.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return getattr(getattr(torch.ops, PACKAGE), name)(*inputs)
    return FUNCTIONS[name].apply(*inputs)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Make `backward` the gradient of an operator, as `torch.library.register_autograd` does.

    An operator whose gradient the compiled library has (csrc/autograd.cpp) keeps that one.
    """
    FUNCTIONS[name] = _function(name, backward, setup_context)
    operator = f"{PACKAGE}::{name}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "Autograd"):
        torch.library.register_autograd(operator, backward, setup_context=setup_context)


def refuse_second_derivatives(*names: str) -> None:
    """Make the backward operators, which have no gradient, raise an error if one is asked for."""

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"the operators of {PACKAGE} have no second derivative: their backward has no gradient"
        )

    for name in names:
        FUNCTIONS[f"{name}_backward"] = _function(f"{name}_backward", refuse, lambda ctx, inputs, output: None)
        torch.library.register_autograd(f"{PACKAGE}::{name}_backward", refuse)


def _function(name: str, backward: Callable, setup_context: Callable) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):
            return getattr(getattr(torch.ops, PACKAGE), name)(*inputs)

    Function.backward, Function.setup_context = staticmethod(backward), staticmethod(setup_context)
    return Function
