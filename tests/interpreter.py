"""Triton's interpreter, quicker: most of its time was not that of the kernels' operations."""

import numpy as np
from triton.runtime import interpreter

_patch, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_patched = set()  # modules whose `tl` a launch has replaced


def _patch_once(function):
    """It does so again for each call of a function of the kernel's, and never undoes that."""
    module = id(function.__globals__)
    if module in _patched:
        return None
    _patched.add(module)
    return _patch(function)


def _launched(self, *arguments, **options) -> None:
    _patched.clear()
    try:
        _launch(self, *arguments, **options)
    finally:
        _patched.clear()


def _scan_by_doubling(self, inputs) -> list:
    """`generic_scan` calls the function once for each element; here it is once for each power of two, on all of them.

    As on a GPU, what the function makes of several elements is combined, and not of one after the other alone.
    """
    found, distance, length = list(inputs), 1, inputs[0].handle.data.shape[self.axis]
    place = np.expand_dims(np.arange(length), tuple(i for i in range(inputs[0].handle.data.ndim) if i != self.axis))
    while distance < length:
        before = [self.to_tensor(np.roll(one.handle.data, distance, self.axis), one.dtype) for one in found]
        with np.errstate(all="ignore"):  # what has gone round the end is not used
            both = self.combine_fn.fn(*before, *found)
        both = both if isinstance(both, tuple) else (both,)
        for i, (one, new) in enumerate(zip(found, both, strict=True)):
            kept = np.where(place < distance, one.handle.data, new.handle.data).astype(one.handle.data.dtype)
            found[i] = self.to_tensor(kept, one.dtype)
        distance *= 2
    return found


def quicken() -> None:
    """Of the Tritons that are known here; others stay as they are."""
    if not hasattr(interpreter, "_LangPatchScope") or interpreter._patch_lang is _patch_once:
        return
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = _patch_once, _launched
    interpreter.ScanOps.generic_scan = _scan_by_doubling
