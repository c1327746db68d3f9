"""Launches Triton kernels with little of the host's time.

Triton looks at every argument of every launch to find what it has compiled for its like, which takes the host longer
than the launch. Here a dictionary finds arguments that were seen before.
"""

import torch
import triton
from torch import Tensor

# From this version on a compiled kernel takes all of its function's parameters, constants included.
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
_MOST = 4096  # compiled kernels that are remembered; sizes that vary all the time must not pile up
_compiled: dict[tuple, tuple] = {}


def launch(kernel: triton.JITFunction, programs: int, *args: Tensor | int | None, **constants) -> None:
    """`kernel[(programs,)](*args, **constants)` on the first argument's device; `constants` in the kernel's order.

    What a compiled kernel depends on of its arguments, types, alignments and integers' values, is part of what it is
    remembered by.
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
    key = (kernel, device.index, *kinds, *constants.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **constants)
        if _DIRECT:
            if len(_compiled) >= _MOST:
                _compiled.clear()
            _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]
        return
    compiled, trailing = found
    compiled[programs, 1, 1](*args, *trailing)
