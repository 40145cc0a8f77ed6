"""Lloyd's iterations of spherical k-means over rows shared among processes.

Each process assigns its share of the rows; the sums of all make the next centroids. An iteration is a function of the rows
and the centroids alone (:mod:`clipcid_cli.algorithms.kmeans.kmeans`), so the centroids are all that a checkpoint needs: a
resumed run finds its labels and sums again by assigning, and ends with the same bytes. Only rows that changed their cluster
change the sums.

Shape letters: N rows of this process, B rows of a run, K centroids, C centroids of a part, D width.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from clipcid_cli.algorithms.kmeans.kmeans import RowReader, sums_of_similarities
from clipcid_cli.algorithms.kmeans.seeding import choose_seeds, rows_as_centroids
from clipcid_cli.algorithms.near.block import Block, make_block
from clipcid_cli.algorithms.near.centroids import ClusterSums, centroids_of_sums, fold_sum
from clipcid_cli.algorithms.near.exact import DoubleArray, IntArray, exact_dots
from clipcid_cli.algorithms.near.nearest import NearestCentroid

# Rows read and prepared at once. On a CPU a run is computed by a thread, which is 1.3 times as fast as all threads on each
# of its operations (60,000 rows, 2,048 centroids, 2 threads).
_RUN_ROWS = {"cpu": 8192, "cuda": 131_072}
_CENTROIDS_AT_ONCE = 16_384


@dataclasses.dataclass(frozen=True)
class LloydState:
    """Centroids after some iterations.

    Attributes:
        centroids_KD: Unit rows on the grid, float32 [K, D], on the CPU.
        converged: Whether the last iteration left every centroid where it was.
        similarity: Mean similarity of the rows to the centroids that the last iteration made of them.
        num_empty: Clusters without a row in the last iteration.
    """

    centroids_KD: torch.Tensor
    iterations: int = 0
    converged: bool = False
    similarity: float = math.nan
    num_empty: int = 0


@dataclasses.dataclass(frozen=True)
class Processes:
    """How this process shares the work with others and with its threads; by default it is alone.

    Attributes:
        share: First row of this process and the row after its last, of N rows.
        sum_: Returns the sum of a tensor over all processes; may change its argument.
        gather: Returns every process's value, in the same order on every process.
        map_runs: As the built-in; may compute several runs of rows at once, a thread each.
    """

    share: Callable[[int], tuple[int, int]] = lambda num_rows: (0, num_rows)
    sum_: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    map_runs: Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]] = map


def run_lloyd(
    rows: RowReader,
    state: LloydState,
    *,
    iterations: int,
    dtype: torch.dtype,
    device: torch.device,
    processes: Processes = Processes(),
    kept_bytes: int = 2**31,
) -> Iterator[LloydState]:
    """Iterate until no centroid moves, or `iterations` are done.

    Memory: 12·K·D bytes for centroids and sums, those of the centroids' copy while rows are assigned, 4 a row, and kept
    rows.

    Args:
        rows: The rows of all processes.
        state: Where to begin.
        iterations: Most iterations in all, those of `state` included.
        dtype: Format of the product that proposes, see `NearestCentroid`.
        kept_bytes: Prepared rows that this process keeps from iteration to iteration; others are read and prepared anew.

    Yields:
        The state after each iteration, the same on every process. The next iteration may overwrite its centroids.
    """
    share = _Share(rows, len(state.centroids_KD), dtype, device, processes, kept_bytes)
    centroids_KD = state.centroids_KD.to(device, copy=True)
    while state.iterations < iterations and not state.converged:
        share.assign(centroids_KD)
        empty_E = (processes.sum_(share.sums.counts_K.clone()) == 0).nonzero()[:, 0]
        seeds_SD = share.farthest_rows(centroids_KD, len(empty_E)) if len(empty_E) else centroids_KD[:0]
        similarity, any_moved = _move(centroids_KD, share.sums.sums_KD, empty_E[: len(seeds_SD)], seeds_SD, processes)
        done = state.iterations + 1
        state = LloydState(centroids_KD.cpu(), done, not any_moved, similarity / len(rows), len(empty_E))
        yield state


class _Share:
    """A process's share of the rows: their clusters, and the sums of those."""

    def __init__(
        self,
        rows: RowReader,
        num_clusters: int,
        dtype: torch.dtype,
        device: torch.device,
        processes: Processes,
        kept_bytes: int,
    ) -> None:
        self.sums = ClusterSums(num_clusters, rows.width, device)
        self._rows, self._dtype, self._device, self._processes = rows, dtype, device, processes
        start, self._stop = processes.share(len(rows))
        self._runs = range(start, self._stop, _RUN_ROWS[device.type])
        self._label_N = torch.full((len(range(start, self._stop)),), -1, dtype=torch.int32, device=device)
        self._changing = threading.Lock()  # of sums, which runs share
        self._kept: dict[int, Block] = {}
        self._num_kept = kept_bytes // ((2 + dtype.itemsize) * rows.width * self._runs.step)

    def assign(self, centroids_KD: torch.Tensor) -> None:
        """Find the nearest centroids of all rows."""
        nearest = NearestCentroid(centroids_KD, self._dtype)

        def assign_run(first: int) -> None:
            block, before_B = self._load(first), self._labels(first)
            label_B = nearest.of(block)
            changed_B = (label_B != before_B).nonzero()[:, 0]
            if len(changed_B):
                old_B = None if bool(before_B[0] < 0) else before_B[changed_B].long()
                with self._changing:
                    self.sums.move(block.stored[changed_B], old_B, label_B[changed_B])
                before_B[:] = label_B

        self._map(assign_run)

    def farthest_rows(self, centroids_KD: torch.Tensor, count: int) -> torch.Tensor:
        """Find rows to re-seed empty clusters with; the same on every process. Float32 [≤ count, D], unit rows."""

        def look(first: int) -> tuple[DoubleArray, IntArray]:
            block, label_B = self._load(first), self._labels(first)
            dots_B = exact_dots(block.stored, centroids_KD, torch.arange(len(block), device=label_B.device), label_B)
            return choose([(dots_B.cpu().numpy(), block.rows)])

        def choose(parts: Sequence[tuple[DoubleArray, IntArray]]) -> tuple[DoubleArray, IntArray]:
            similarity_P, number_P = (np.concatenate(found) for found in zip(*parts, strict=True))
            chosen = choose_seeds(similarity_P, number_P, self._rows.features_at, count)
            return similarity_P[chosen], number_P[chosen]

        mine = choose(self._map(look))
        return rows_as_centroids(self._rows, choose(self._processes.gather(mine))[1]).to(self._device)

    def _map(self, compute: Callable[[int], Any]) -> list[Any]:
        return list(self._processes.map_runs(compute, self._runs))

    def _labels(self, first: int) -> torch.Tensor:
        """Return the clusters of a run, −1 at first; a view, int32 [B]."""
        return self._label_N[first - self._runs.start :][: self._runs.step]

    def _load(self, first: int) -> Block:
        """Read and prepare a run of rows, or return it as it was kept."""
        if first in self._kept:
            return self._kept[first]
        last = min(self._stop, first + self._runs.step)
        stored = torch.from_numpy(np.array(self._rows.features(first, last))).to(self._device)
        block = make_block(np.arange(first, last), stored, self._dtype)
        if len(self._kept) < self._num_kept:
            self._kept[first] = block
        return block


def _move(
    centroids_KD: torch.Tensor,
    sums_KD: torch.Tensor,
    seeded_S: torch.Tensor,
    seeds_SD: torch.Tensor,
    processes: Processes,
) -> tuple[float, bool]:
    """Turn the sums of all processes into centroids, in place and some at a time; give some clusters a seed.

    Returns:
        The sum of the similarities of all rows to the centroids of their clusters now, and whether any centroid moved.
    """
    similarity_K = torch.empty(len(centroids_KD), dtype=torch.float64, device=centroids_KD.device)
    any_moved = False
    for first in range(0, len(centroids_KD), _CENTROIDS_AT_ONCE):
        part = slice(first, first + _CENTROIDS_AT_ONCE)
        sums_CD, old_CD = processes.sum_(sums_KD[part].clone()), centroids_KD[part]
        new_CD = centroids_of_sums(sums_CD, old_CD)
        if len(seeded_S):
            here_S = (seeded_S >= first) & (seeded_S < first + len(new_CD))
            new_CD[seeded_S[here_S] - first] = seeds_SD[here_S]
        similarity_K[part] = sums_of_similarities(sums_CD, new_CD)
        any_moved |= not torch.equal(new_CD, old_CD)
        centroids_KD[part] = new_CD
    return float(fold_sum(similarity_K[None])[0]), any_moved
