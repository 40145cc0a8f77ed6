"""What libraries are told: to be imported fast, to print nothing over a step's own output, and which memory to keep."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_SPINS = "0"
# Other programs that run for a moment only are not seen at every look.
_LOOKS = 5
_SECONDS_BETWEEN_LOOKS = 0.01

# Variables by which users say how PyTorch takes a GPU's memory, by their present and their former names.
_ALLOCATION = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# Of glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


@contextmanager
def importing() -> Iterator[None]:
    """Switch garbage collection off while the block imports, and exempt what it made from later collections.

    Imports make 400,000 objects and keep them all; Python would search them again and again: those of `eval-zeroshot` took
    1.45 s of processor time in place of 1.12.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop Python warnings and everything logged below an error; exceptions and logged errors pass.

    While a model is loaded or exported, open_clip, transformers, PyTorch and ONNX Runtime log progress and advice about
    choices that are not the user's, some of it on the root logger.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def quiet_native_code() -> Iterator[None]:
    """Drop what this process, its libraries in C++ included, writes to stderr; for moments only."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def set_openmp_spins(spins: str) -> None:
    """Say how long OpenMP's idle threads spin before they sleep, unless the user has; to be called before torch loads.

    Beside programs that keep half of the cores busy they do not spin: a thread that waits for one without a core would keep
    its own from that one. On 2 such cores a training took 30 samples/s with two threads that spin for 0.1 ms, 104 to 145
    with two that do not, and 113 to 128 with one thread.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = NO_SPINS if spins != NO_SPINS and _is_busy() else spins


def let_gpu_memory_grow() -> None:
    """Let PyTorch extend the pieces that it takes of a GPU's memory, unless the user has said how it takes them.

    Texts of a batch have another length in each step: pieces of fixed sizes then leave gaps between them that nothing fits.
    To be called before torch loads.
    """
    if os.environ.keys().isdisjoint(_ALLOCATION):
        os.environ[_ALLOCATION[0]] = "expandable_segments:True"


def _is_busy() -> bool:
    """Tell whether other threads want at least half of the machine's cores, by Linux's count of those that can run."""
    running = list[int]()
    for _ in range(_LOOKS):
        try:
            running.append(int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0]))
        except OSError:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return min(running) - 1 >= max(1, (os.cpu_count() or 1) // 2)  # without this one


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, until it ends; for loops that allocate the same amounts again and again.

    glibc unmaps each large tensor that is freed, and the system clears every page that a training step maps again: 7 % of
    the step's processor time on a CPU (a CLIP of 13 M parameters at 64 px). Other C libraries have no such setting.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never


def keep_few_kernels() -> None:
    """Let this process keep fewer of the kernels that oneDNN compiles, one for each shape of a product; 1,024 by default.

    Products of hundreds of shapes, few of which come twice, then do not fill a GiB of memory (measured, bfloat16 with AMX:
    1,040 MB above the libraries, and 250 MB with 64 kernels). Of no effect once oneDNN has been used, nor where the user has
    set the limits.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
