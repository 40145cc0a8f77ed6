"""What libraries are told: to be imported fast, to print nothing over a step's own output, and which memory to keep."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
