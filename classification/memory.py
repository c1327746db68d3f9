"""What the C library does with memory that PyTorch frees on a CPU."""

import ctypes

# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next tensor instead of handing it back to the system.

    PyTorch has no allocator of its own on a CPU. As glibc is set by default, each step of training maps its activations
    anew, and the system zeroes them page by page. Returns whether there is a glibc to set.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, 2**26))
    done = [mallopt(option, value) for option, value in settings]  # all of them, whatever the first says
    return all(done)
