"""Launches Triton kernels with little of the host's time.

Triton looks at every argument of every launch to find what it has compiled for its like, which takes the host longer
than the launch. Here a dictionary finds arguments that were seen before, and what it finds is launched at once.
"""

import torch
import triton
from torch import Tensor

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# From this version on a compiled kernel takes all of its function's parameters, constants included.
_REMEMBERS = _TRITON >= (3, 3)
# Versions whose compiled kernels are known to take what `_bare` passes; with others, Triton's own call does.
_TAKES_BARE_ARGUMENTS = (3, 3) <= _TRITON <= (3, 6)
_MOST = 4096  # compiled kernels that are remembered; sizes that vary all the time must not pile up
_compiled: dict[tuple, tuple] = {}


def launch(kernel: triton.JITFunction, programs: int, *args: Tensor | int | None, **constants) -> None:
    """`kernel[(programs,)](*args, **constants)` on the first argument's device; `constants` in the kernel's order.

    What a compiled kernel depends on of its arguments, types, alignments and integers' values, is part of what it is
    remembered by. Hooks of Triton's profiler see the first launch alone.
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
    key = (id(kernel), device.index, *kinds, *constants.values())  # its own hash is of its source
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
    """Past what Triton does before each launch: it asks for the device, the stream and the hooks of its profiler."""
    run, function, packed_metadata = compiled.run, compiled.function, compiled.packed_metadata
    current_stream = torch._C._cuda_getCurrentRawStream

    def call(programs, device, *args):
        run(programs, 1, 1, current_stream(device), function, packed_metadata, None, None, None, *args)

    return call


def _by_triton(compiled):
    return lambda programs, device, *args: compiled[programs, 1, 1](*args)
