"""Memory this process uses."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def memory_in_use(device: torch.device) -> int:
    """Return the bytes in use: of a GPU, what PyTorch has reserved there; else the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        # Without /proc (macOS) the peak stands in; it is in bytes there, in KiB elsewhere.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return pages * resource.getpagesize()
