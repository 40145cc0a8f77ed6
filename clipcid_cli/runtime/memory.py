"""Memory this process uses, and how a training loop on a CPU keeps what it frees."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

# Of glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def memory_in_use(device: torch.device) -> int:
    """Return the bytes in use: of a GPU, what PyTorch has reserved there; else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        # Without /proc (macOS) the peak is the best there is; it is in bytes there, in KiB elsewhere.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return pages * resource.getpagesize()


def memory_for_rows(device: torch.device, on_cpu: int = 2**31) -> int:
    """Return how many bytes of rows a process may keep on its device: on a GPU 60 % of what is free."""
    if device.type != "cuda":
        return on_cpu
    free, _ = torch.cuda.mem_get_info(device)
    return int(0.6 * free)


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, until it ends; for loops that allocate the same amounts again and again.

    glibc unmaps each large tensor that is freed, and the system clears every page that a training step maps again: 7 % of
    the step's processor time on a CPU (a CLIP of 13 M parameters at 64 px). Other C libraries have no such setting.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never


def keep_few_kernels(number: int = 64) -> None:
    """Let this process keep fewer of the kernels that oneDNN compiles, one for each shape of a product; 1,024 by default.

    Products of hundreds of shapes, few of which come twice, then do not fill a GiB of memory (measured, bfloat16 with AMX:
    1,040 MB above the libraries, and 250 MB with 64 kernels). Of no effect once oneDNN has been used, nor where the user has
    set the limits.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(number))
