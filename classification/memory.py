"""What the C library does with memory that PyTorch frees on a CPU."""

import ctypes
import os

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_NEVER = 2**31 - 1
OFF = "SPATIALMAMBA_RELEASE_MEMORY"  # an environment variable


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor, of any size, instead of handing it back to the system.

    PyTorch has no allocator of its own on a CPU. As glibc is set by default, each pass maps its activations anew, and
    the system zeroes them page by page: of large images, that takes longer than the computation. What is kept is the
    most that was in use at once, and gaps between tensors; `release_freed_memory` hands it back.

    The environment variable SPATIALMAMBA_RELEASE_MEMORY=1 leaves glibc as it is. jemalloc and tcmalloc, loaded in its
    place, are left alone too.

    Returns:
        Whether there is a glibc that was set.
    """
    if os.environ.get(OFF, "0") != "0" or (libc := _glibc()) is None:
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_MMAP_MAX, 0),  # above that threshold too
        (_M_TRIM_THRESHOLD, _NEVER),
        (_M_TOP_PAD, 2**26),
    )
    done = [libc.mallopt(option, value) for option, value in settings]  # all of them, whatever the first says
    return all(done)


def release_freed_memory() -> bool:
    """Hand what glibc keeps back to the system, as after images of another size. Returns whether it did."""
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt, libc.malloc_trim, libc.gnu_get_libc_version  # noqa: B018, musl has none of them
    except (AttributeError, OSError, TypeError):
        return None
    return libc
