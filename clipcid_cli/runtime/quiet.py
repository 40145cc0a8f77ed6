"""Keeping other libraries from printing over a step's own output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


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
