"""A faster interpreter of Triton's kernels: it spent most of its time outside the kernels' own operations."""

import numpy as np
from triton.runtime import interpreter

_patch, _launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
_patched = set()  # modules whose `tl` a launch has replaced


def _patch_once(function):
    """Replace a module's `tl` once in a launch. Triton does it again for each call of a device function."""
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
    """Scan by doubling: call the function once for each power of two, on all elements together.

    Triton's `generic_scan` calls the function once for each element. A GPU combines results of several elements too.
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
    """Replace the slow parts of the interpreter, if this version of Triton has the parts that this file knows."""
    if not hasattr(interpreter, "_LangPatchScope") or interpreter._patch_lang is _patch_once:
        return
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = _patch_once, _launched
    interpreter.ScanOps.generic_scan = _scan_by_doubling
