"""Launches Triton kernels with little host time.

selective_scan and dwconv2d each have a copy of this file; tests/kernels/test_install.py checks that they are equal.

For every launch, Triton inspects every argument to find the kernel that it has compiled for such arguments. This takes
the host longer than the launch itself. Here, a dictionary maps known arguments to their compiled kernel.
The scan and the operators on planes do not use it: Triton runs them only where no CUDA kernels are compiled.
"""

import torch
import triton
from torch import Tensor

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# From this version on, a compiled kernel takes all parameters of its function, constants included.
_REMEMBERS = _TRITON >= (3, 3)
# Versions whose compiled kernels are known to take the arguments that `_bare` passes. Others use Triton's own call.
_TAKES_BARE_ARGUMENTS = (3, 3) <= _TRITON <= (3, 6)
_MOST = 4096  # limit of compiled kernels to remember, because some programs never stop using new sizes
_compiled: dict[tuple, tuple] = {}


def launch(kernel: triton.JITFunction, programs: int, *args: Tensor | int | None, **constants) -> None:
    """`kernel[(programs,)](*args, **constants)` on the first argument's device. `constants` are in the kernel's order.

    A compiled kernel depends on the types, alignments and integer values of its arguments, so all of these are in the
    dictionary's key. Hooks of Triton's profiler see only the first launch.
    """
    if programs == 0:
        return
    device = args[0].device
    if device.type != "cuda":  # Triton's interpreter
        kernel[(programs,)](*args, **constants)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, *args, **constants)
        return
    kinds = [(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args]
    key = (id(kernel), device.index, *kinds, *constants.values())  # `hash(kernel)` hashes its source
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **constants)
        if _REMEMBERS:
            if len(_compiled) >= _MOST:
                _compiled.clear()
            call = _bare(compiled) if _TAKES_BARE_ARGUMENTS else _by_triton(compiled)
            _compiled[key] = call, [constants[name] for name in kernel.arg_names[len(args) :]]
        return
    call, trailing = found
    call(programs, device.index, *args, *trailing)


def _bare(compiled):
    """Make a call that skips Triton's work before each launch: it asks for device, stream and its profiler's hooks."""
    run, function, packed_metadata = compiled.run, compiled.function, compiled.packed_metadata
    current_stream = torch._C._cuda_getCurrentRawStream

    def call(programs, device, *args):
        run(programs, 1, 1, current_stream(device), function, packed_metadata, None, None, None, *args)

    return call


def _by_triton(compiled):
    return lambda programs, device, *args: compiled[programs, 1, 1](*args)
