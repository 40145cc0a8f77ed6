"""Similarities of single pairs of a row and a centroid, exact in float64.

Shape letters: B rows of a block, K centroids, D width, P (row, centroid) pairs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Pairs decided at once: on a CPU the operands stay within its cache.
_PAIRS = {"cpu": 256, "cuda": 65_536}
# A thread for fewer pairs gains nothing.
_PAIRS_A_THREAD = 1024


def pair_similarities(
    rows_BD: torch.Tensor,
    centroids_KD: torch.Tensor,
    row_P: torch.Tensor,
    centroid_P: torch.Tensor,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the similarity of each pair, [P], summed in float64 (where it is exact) or float32.

    Args:
        rows_BD: float16, or the same values in float32, which is faster where they are there.
        centroids_KD: float32.
    """
    result_P = torch.empty(len(row_P), dtype=dtype, device=rows_BD.device)
    if rows_BD.device.type == "cpu":
        _on_cpu(*(part.numpy() for part in (rows_BD, centroids_KD, row_P, centroid_P, result_P)))
        return result_P
    for first in range(0, len(row_P), _PAIRS["cuda"]):
        part = slice(first, first + _PAIRS["cuda"])
        torch.linalg.vecdot(
            rows_BD[row_P[part]].to(dtype), centroids_KD[centroid_P[part]].to(dtype), out=result_P[part]
        )
    return result_P


def _on_cpu(
    rows: npt.NDArray[Any],
    centroids: npt.NDArray[np.float32],
    row: npt.NDArray[np.int64],
    centroid: npt.NDArray[np.int64],
    result: npt.NDArray[Any],
) -> None:
    """Fill in the result, by as many threads as PyTorch uses: numpy releases Python's lock while it multiplies."""

    def decide(start: int, stop: int) -> None:
        # einsum widens its operands on the way, in a third of the time of copies (0.9 against 2.7 µs a pair, D = 512).
        for first in range(start, stop, _PAIRS["cpu"]):
            part = slice(first, min(stop, first + _PAIRS["cpu"]))
            result[part] = np.einsum("pd,pd->p", rows[row[part]], centroids[centroid[part]], dtype=result.dtype)

    threads = max(1, min(torch.get_num_threads(), len(row) // _PAIRS_A_THREAD))
    bounds = [len(row) * number // threads for number in range(threads + 1)]
    if threads == 1:
        decide(0, len(row))
    else:
        list(_pool(threads).map(decide, bounds[:-1], bounds[1:]))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pairs")
