"""Settings of the C library for memory that PyTorch frees on a CPU."""

import ctypes
import os

# Options of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_NEVER = -1  # as mallopt(3) has it: 2**31 - 1 would hand back what is free above 2 GiB
OFF = "SPATIALMAMBA_RELEASE_MEMORY"  # an environment variable


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor, of any size, instead of handing it back to the system.

    PyTorch has no allocator of its own on a CPU. With glibc's default settings, each pass maps its activations anew,
    and the system zeroes them page by page; for large images, this takes longer than the computation. glibc then keeps
    as much memory as was in use at once, and the gaps between tensors; `release_freed_memory` hands both back.

    The environment variable SPATIALMAMBA_RELEASE_MEMORY=1 leaves glibc as it is. jemalloc and tcmalloc, loaded in place
    of glibc's allocator, also stay as they are.

    Returns:
        Whether glibc is there and accepted all settings.
    """
    if os.environ.get(OFF, "0") != "0" or (libc := _glibc()) is None:
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_MMAP_MAX, 0),  # no mmap, even above the threshold
        (_M_TRIM_THRESHOLD, _NEVER),
        (_M_TOP_PAD, 2**26),
    )
    done = [libc.mallopt(option, value) for option, value in settings]  # makes all calls, even after a failure
    return all(done)


def release_freed_memory() -> bool:
    """Hand freed memory back to the system, for example after images of another size. Return whether glibc did so."""
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt, libc.malloc_trim, libc.gnu_get_libc_version  # noqa: B018, musl lacks all three
    except (AttributeError, OSError, TypeError):
        return None
    return libc
