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

# Pairs decided at once by a GPU.
_PAIRS_ON_GPU = 65_536
# Entries of rows picked at once by a CPU: the operands stay near its caches.
_ENTRIES = 2**17
# PyTorch converts no more than these by one thread; others have work of their own.
_ENTRIES_BY_A_THREAD = 2**15
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
        rows_BD: float16, or the same values in float32.
        centroids_KD: float32.
    """
    result_P = torch.empty(len(row_P), dtype=dtype, device=rows_BD.device)
    if rows_BD.device.type == "cpu":
        _on_cpu(rows_BD, centroids_KD, row_P.numpy(), centroid_P.numpy(), result_P.numpy())
        return result_P
    for first in range(0, len(row_P), _PAIRS_ON_GPU):
        part = slice(first, first + _PAIRS_ON_GPU)
        torch.linalg.vecdot(
            rows_BD[row_P[part]].to(dtype), centroids_KD[centroid_P[part]].to(dtype), out=result_P[part]
        )
    return result_P


class _Picked:
    """Rows of a matrix that are picked and widened, in the same memory each time: fresh memory takes as long as the rest."""

    def __init__(self, matrix: torch.Tensor, most: int, dtype: torch.dtype) -> None:
        self._matrix = matrix.numpy()
        picked = torch.empty(most, matrix.shape[1], dtype=matrix.dtype)
        # By way of float32: of both ways from float16 to float64 the faster one.
        single = picked if matrix.dtype == torch.float32 else torch.empty_like(picked, dtype=torch.float32)
        self._half, self._single = picked, single
        self._wide = single.numpy() if dtype == torch.float32 else torch.empty_like(picked, dtype=dtype).numpy()

    def take(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return rows by their numbers, until the next call."""
        number = len(numbers)
        # Numbers are right: "clip" only keeps NumPy from another copy.
        np.take(self._matrix, numbers, axis=0, out=self._half[:number].numpy(), mode="clip")
        if self._half is not self._single:
            at_once = max(1, _ENTRIES_BY_A_THREAD // self._half.shape[1])
            for first in range(0, number, at_once):
                part = slice(first, min(number, first + at_once))
                self._single[part] = self._half[part]
        wide = self._wide[:number]
        if wide.dtype != np.float32:
            np.copyto(wide, self._single[:number].numpy())
        return wide


def _on_cpu(
    rows_BD: torch.Tensor,
    centroids_KD: torch.Tensor,
    row: npt.NDArray[np.int64],
    centroid: npt.NDArray[np.int64],
    result: npt.NDArray[Any],
) -> None:
    """Fill in the result, by as many threads as PyTorch uses: NumPy releases Python's lock while it multiplies."""
    dtype = torch.float32 if result.dtype == np.float32 else torch.float64

    def decide(start: int, stop: int) -> None:
        most = min(stop - start, max(1, _ENTRIES // rows_BD.shape[1]))
        rows, centroids = (_Picked(matrix, most, dtype) for matrix in (rows_BD, centroids_KD))
        for first in range(start, stop, most or 1):
            part = slice(first, min(stop, first + most))
            # With D = 512 in 0.6 of the time of an einsum of copies in fresh memory; in float32, in a quarter.
            products = np.matmul(rows.take(row[part])[:, None, :], centroids.take(centroid[part])[:, :, None])
            result[part] = products[:, 0, 0]

    threads = max(1, min(torch.get_num_threads(), len(row) // _PAIRS_A_THREAD))
    bounds = [len(row) * number // threads for number in range(threads + 1)]
    if threads == 1:
        decide(0, len(row))
    else:
        list(_pool(threads).map(decide, bounds[:-1], bounds[1:]))


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="pairs")
