"""Keeping freed memory for the next step instead of giving it back to the system.

glibc takes each large tensor from the system and gives it back when it is freed. A training step on a CPU frees and takes
all its activations, and the system clears every page anew.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, until it ends; for loops that take the same amounts again and again.

    Returns:
        Whether the C library has such a setting (glibc has; musl and macOS have not).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, _NEVER) == 1)
