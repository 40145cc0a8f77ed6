"""Lloyd's iterations of spherical k-means over rows shared among processes.

Each process assigns its share of the rows to their nearest centroids; the sums of all make the next centroids. Both are the
same in any order and format (:func:`clipcid_cli.algorithms.near.nearest.nearest`,
:mod:`clipcid_cli.algorithms.kmeans.centroids`), so an iteration is a function of the rows and the centroids alone: the
centroids are all that a checkpoint needs, and a resumed run ends with the same bytes, on any number of processes. After the
first iteration only rows that changed their cluster change the sums.

Source: docs/method.md#k-means.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.kmeans.centroids import (
    ClusterSums,
    RowReader,
    centroids_of_sums,
    choose_seeds,
    rows_as_centroids,
)
from clipcid_cli.algorithms.near.exact import DoubleArray, IntArray, fold_sum
from clipcid_cli.algorithms.near.nearest import Integers, nearest

# Rows read and prepared at once. On a CPU a run is computed by a thread, which is 1.3 times as fast as all threads on each
# of its operations (60,000 rows, 2,048 centroids, 2 threads).
_RUN_ROWS = {"cpu": 8192, "cuda": 131_072}
# Centroids moved at once: on a CPU they stay near the caches, which takes a fifth of the time.
_CENTROIDS_AT_ONCE = {"cpu": 512, "cuda": 16_384}


@dataclasses.dataclass(frozen=True)
class LloydState:
    """Centroids after some iterations."""

    centroids_KD: torch.Tensor  # unit rows on the grid, float32 [K, D], on the CPU
    iterations: int = 0
    converged: bool = False  # whether the last iteration left every centroid where it was
    similarity: float = math.nan  # mean similarity of the rows to the centroids that the last iteration made of them
    num_empty: int = 0  # clusters without a row in the last iteration


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process shares the work with others and with its threads; by default it is alone."""

    # First row of this process and the row after its last, of N rows.
    rank_range: Callable[[int], tuple[int, int]] = lambda num_rows: (0, num_rows)
    # Returns the sum of a tensor over all processes; may change its argument.
    sum_: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    # Returns every process's value, in the same order on every process.
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    # As the built-in; may compute several runs of rows at once, a thread each.
    map_runs: Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]] = map
    # Of rows as integers, how much is kept from iteration to iteration; others are read and rounded anew.
    kept_bytes: int = 2**31


def run_lloyd(
    rows: RowReader,
    state: LloydState,
    *,
    iterations: int,
    dtype: torch.dtype,
    device: torch.device,
    processes: Processes = Processes(),
) -> Iterator[LloydState]:
    """Iterate until no centroid moves, or `iterations` are done.

    Memory: 13·K·D bytes for centroids, their integers and sums, 12 a row, and kept rows.

    Args:
        iterations: Most iterations in all, those of `state` included.
        dtype: Format of fast products on the device, see `Integers.from_rows`.

    Yields:
        The state after each iteration, the same on every process. The next iteration may overwrite its centroids.
    """
    mine = _RankRows(rows, len(state.centroids_KD), dtype, device, processes)
    centroids_KD = state.centroids_KD.to(device, copy=True)
    while state.iterations < iterations and not state.converged:
        mine.assign(centroids_KD)
        empty_E = (processes.sum_(mine.sums.counts_K.clone()) == 0).nonzero()[:, 0]
        seeds_SD = mine.farthest_rows(len(empty_E)) if len(empty_E) else centroids_KD[:0]
        similarity, moved = _move(centroids_KD, mine.sums.sums_KD, empty_E[: len(seeds_SD)], seeds_SD, processes)
        mean = similarity / len(rows)
        state = LloydState(centroids_KD.cpu(), state.iterations + 1, not moved, mean, len(empty_E))
        yield state


def bytes_of_run(device: torch.device, num_rows: int, width: int, integer_bytes: int) -> int:
    """Return the bytes of the rows that are read and prepared at once, as they are stored and as integers."""
    return min(num_rows, _RUN_ROWS[device.type]) * width * (2 + integer_bytes)


class _RankRows:
    """The share of the rows that a process has: the cluster of each row, and the sums of the rows of each cluster."""

    def __init__(
        self, rows: RowReader, num_clusters: int, dtype: torch.dtype, device: torch.device, processes: Processes
    ) -> None:
        self.sums = ClusterSums(num_clusters, rows.width, device)
        self._rows = rows
        self._dtype = dtype
        self._device = device
        self._processes = processes
        start, self._stop = processes.rank_range(len(rows))
        self._runs = range(start, self._stop, _RUN_ROWS[device.type])
        size = self._stop - start
        self._label_N = torch.full((size,), -1, dtype=torch.int32, device=device)  # −1 before the first assignment
        self._similarity_N = torch.empty(size, dtype=torch.float64, device=device)
        self._changing = threading.Lock()  # of sums, which runs share
        self._kept = dict[int, Integers]()

    def assign(self, centroids_KD: torch.Tensor) -> None:
        """Put all rows into the clusters of their nearest centroids."""
        centroids = Integers.from_rows(centroids_KD, self._dtype, one_step=True)
        for _ in self._processes.map_runs(partial(self._assign_run, centroids), self._runs):
            pass

    def _assign_run(self, centroids: Integers, first: int) -> None:
        place = slice(first - self._runs.start, first - self._runs.start + self._runs.step)
        rows, stored_BD = self._load(first)
        number_B, self._similarity_N[place] = nearest(rows, centroids)
        before_B = self._label_N[place].long()
        changed_B = (number_B != before_B).nonzero()[:, 0]
        if not len(changed_B):
            return
        changed_BD = self._read(first + changed_B.cpu().numpy()) if stored_BD is None else stored_BD[changed_B]
        is_first = bool(before_B[0] < 0)
        with self._changing:
            self.sums.move(changed_BD, None if is_first else before_B[changed_B], number_B[changed_B])
        self._label_N[place] = number_B.int()

    def farthest_rows(self, count: int) -> torch.Tensor:
        """Find rows to re-seed empty clusters with; the same on every process. Float32 [≤ count, D], unit rows."""

        def choose(parts: Iterable[tuple[DoubleArray, IntArray]]) -> tuple[DoubleArray, IntArray]:
            similarity_P, number_P = (np.concatenate(column) for column in zip(*parts, strict=True))
            chosen = choose_seeds(similarity_P, number_P, self._rows.features, count)
            return similarity_P[chosen], number_P[chosen]

        def choose_of_run(first: int) -> tuple[DoubleArray, IntArray]:
            begin = first - self._runs.start
            similarity_B = self._similarity_N[begin : begin + self._runs.step].cpu().numpy()
            return choose([(similarity_B, np.arange(first, first + len(similarity_B)))])

        nobody = (np.empty(0), np.empty(0, np.int64))
        mine = choose([choose_of_run(first) for first in self._runs] or [nobody])
        return rows_as_centroids(self._rows, choose(self._processes.gather(mine))[1]).to(self._device)

    def _load(self, first: int) -> tuple[Integers, torch.Tensor | None]:
        """Return a run of rows as integers; and as they are stored, where they had to be read for it."""
        if first in self._kept:
            return self._kept[first], None
        stored_BD = self._read(np.arange(first, min(self._stop, first + self._runs.step)))
        rows = Integers.from_rows(stored_BD, self._dtype)
        if (len(self._kept) + 1) * rows.num_bytes <= self._processes.kept_bytes:  # all runs but the last are as long
            self._kept[first] = rows
        return rows, stored_BD

    def _read(self, numbers: IntArray) -> torch.Tensor:
        return torch.from_numpy(self._rows.features(numbers)).to(self._device)


def _move(
    centroids_KD: torch.Tensor,
    sums_KD: torch.Tensor,
    seeded_S: torch.Tensor,
    seeds_SD: torch.Tensor,
    processes: Processes,
) -> tuple[float, bool]:
    """Turn the sums of all processes into centroids, in place and some at a time; give some clusters a seed.

    Returns:
        The sum of the similarities of all rows to the centroids of their clusters, which is the length of the clusters' sums
        where these made the centroids; and whether any centroid moved.
    """
    similarity_K = torch.empty(len(centroids_KD), dtype=torch.float64, device=centroids_KD.device)
    moved = False
    at_once = _CENTROIDS_AT_ONCE[centroids_KD.device.type]
    for first in range(0, len(centroids_KD), at_once):
        part = slice(first, first + at_once)
        sums_CD = processes.sum_(sums_KD[part].clone())
        old_CD = centroids_KD[part]
        new_CD = centroids_of_sums(sums_CD, old_CD)
        if len(seeded_S):
            here_S = (seeded_S >= first) & (seeded_S < first + len(new_CD))
            new_CD[seeded_S[here_S] - first] = seeds_SD[here_S]
        similarity_K[part] = fold_sum(sums_CD * new_CD.double())
        moved = moved or not torch.equal(old_CD, new_CD)
        centroids_KD[part] = new_CD
    return float(fold_sum(similarity_K[None])[0]), moved
