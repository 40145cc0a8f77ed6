"""Values at many places of a large array, by all threads: a core waits for memory at nearly every place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Value = TypeVar("Value", bound=np.generic)

_PLACES_OF_THREAD = 2**20


def gather(values: npt.NDArray[Value], places: npt.NDArray[np.signedinteger[Any]]) -> npt.NDArray[Value]:
    """Return the values, [N], at some places, integers [n] in [0, N)."""
    threads = torch.get_num_threads()
    if threads == 1 or len(places) <= _PLACES_OF_THREAD:
        return values.take(places)
    gathered = np.empty(len(places), values.dtype)

    def take(start: int) -> None:
        part = slice(start, start + _PLACES_OF_THREAD)
        values.take(places[part], out=gathered[part], mode="clip")  # without a check NumPy needs no copy

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(take, range(0, len(places), _PLACES_OF_THREAD)):
            pass
    return gathered
