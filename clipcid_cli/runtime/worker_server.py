"""Imported by the server that workers are forked from, and there alone.

A worker whose main process has ended says nothing of it: where that happens while the worker is told its work, Python would
print that pickled data was truncated, after the prompt.
"""

from __future__ import annotations

import pickle
import sys
from types import TracebackType


def _say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    # The name of an error: nothing is unpickled here.
    if not issubclass(kind, (EOFError, ConnectionError, pickle.UnpicklingError)):
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _say
