"""The C library's allocator, told to keep the memory that XLA frees after each step on a CPU.

XLA takes its temporaries as one block of hundreds of megabytes a step. glibc maps such a block anew each time and gives it
back after, and the kernel then zeroes it page by page: up to 170,000 page faults a step, a fifth of a small model's time.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # names of parameters in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Sets glibc's trim_threshold to its maximum, mmap_max to 0 and arena_max to 1; True if the library took them.

    The same as GLIBC_TUNABLES=glibc.malloc.trim_threshold=...:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1, but from
    inside. Does nothing where the C library isn't glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all([library.mallopt(_TRIM_THRESHOLD, 2**31 - 1), library.mallopt(_MMAP_MAX, 0), library.mallopt(_ARENA_MAX, 1)])
