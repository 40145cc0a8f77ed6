"""What tests of k-means share: rows in memory, and iterations on one process or several."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans.centroids import first_centroids
from clipcid_cli.algorithms.kmeans.lloyd import LloydState, Processes, run_lloyd


class ArrayRows:
    """Rows of an array, as k-means reads them."""

    def __init__(self, values: npt.NDArray[np.float16]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def features(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        return self.values[positions]


def unit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float16]:
    """Normalise rows."""
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


class Exchange:
    """What processes tell each other, for threads that stand in for them."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._values: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait(60)
        values = list(self._values)
        self._barrier.wait(60)
        return values


def run(
    values: npt.NDArray[np.float16],
    state: LloydState,
    *,
    iterations: int = 12,
    dtype: torch.dtype = torch.float32,
    processes: int = 1,
    kept_bytes: int = 2**31,
) -> list[LloydState]:
    """Return the states after each iteration, once it is clear that they are the same on every process."""
    exchange = Exchange(processes)
    states: list[list[LloydState]] = [[] for _ in range(processes)]

    def work(rank: int) -> None:
        gather: Callable[[Any], list[Any]] = lambda value: exchange.gather(rank, value)  # noqa: E731
        for after in run_lloyd(
            ArrayRows(values),
            LloydState(state.centroids_KD.clone(), state.iterations),
            iterations=iterations,
            dtype=dtype,
            device=torch.device("cpu"),
            processes=Processes(
                lambda number: (number * rank // processes, number * (rank + 1) // processes),
                lambda tensor: torch.stack(gather(tensor)).sum(dim=0),
                gather,
                kept_bytes=kept_bytes,
            ),
        ):
            states[rank].append(dataclasses.replace(after, centroids_KD=after.centroids_KD.clone()))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in states[1:]:
        assert_same(states[0], other)
    return states[0]


def assert_same(one: list[LloydState], other: list[LloydState]) -> None:
    """Compare centroids bit for bit, and what else states say."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.centroids_KD, b.centroids_KD)
        assert (a.iterations, a.converged, a.similarity, a.num_empty) == (
            b.iterations, b.converged, b.similarity, b.num_empty
        )  # fmt: skip


def beginning(values: npt.NDArray[np.float16], num_clusters: int) -> LloydState:
    """Choose the first centroids."""
    return LloydState(first_centroids(ArrayRows(values), num_clusters, 0))
