"""Importing large libraries fast, and keeping them from printing over a step's own output."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
