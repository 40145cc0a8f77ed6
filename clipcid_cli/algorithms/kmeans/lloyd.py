"""Lloyd's iterations of spherical k-means over rows shared among processes.

Each process assigns its share of the rows; the sums of all make the next centroids. An iteration is a function of the rows
and the centroids alone, since nearest centroids (:mod:`clipcid_cli.algorithms.near.nearest`) and sums
(:mod:`clipcid_cli.algorithms.kmeans.centroids`) are exact. So the centroids are all that a checkpoint needs: a resumed run
finds its labels and sums again by assigning, and ends with the same bytes. After the first iteration only rows that changed
their cluster change the sums.

**Bounds** tell which centroids a row must be compared with again after all have moved a little. Of a row x are known its
nearest centroid a, the exact similarity s = x·c_a, and a bound u with x·c_j ≤ u for all j ≠ a; as a is nearest, u ≤ s may be
taken. The centroids move to c', by δ_j = |c'_j − c_j|, and s' = x·c'_a is computed exactly. By Cauchy–Schwarz
x·c'_j ≤ u + |x|·δ_j, so

- when s' > u: centroids with |x|·δ_j < s' − u stay behind a. The row is compared with those of at least a part θ of
  that gap; the others keep the bound u + |x|·δ with δ their largest movement. A smaller θ compares more now and keeps u
  lower, which saves comparisons later.
- when s' ≤ u and s' ≥ s, which is s' = u = s: centroids that did not move stay behind a, and in ties too, since they lost
  to a before by the same rule. The row is compared with those that moved.
- else (s' ≤ u and s' < s): with all.

In the order of their movement, farthest first, the centroids to compare with are always the leading ones, so rows that need
about equally many share one matrix product. What is found is exact; bounds only decide what is looked at. In the manner
of Hamerly 2010 and of Ding et al. 2015 (Yinyang k-means), with one bound a row: small clusters that move far cost only
themselves.

**Coarse iterations.** Of many clusters, whose first centroids are single rows, nearly all move far in the first iterations,
where bounds spare little. Those compare rows roughly and with some centroids only
(:mod:`clipcid_cli.algorithms.kmeans.coarse`), until few centroids move: k-means of 60,000 rows and 2,048 clusters takes
0.6 to 0.8 of the processor time, and the mean similarity ends at most 0.4 % lower. They need the clusters of the iteration
before, so no run is resumed between them.

**Loose iterations.** A row x holds itself in its cluster: with S the sum of the cluster's rows and s = x·c it is, to first
order, (1 − s²)/(|S| − s) more similar to their mean than to that of the others. Where clusters have few rows this keeps them
as they began. So in the first coarse iterations the similarity of each row to the centroid of its own is lowered by some
times that, less and less. Alone, this made the mean similarity 1.7 % larger (clothing features), 1.5, 0.2 and 2.5 % (rows of
recipes/benchmarks: mixture, spectrum, random).
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from clipcid_cli.algorithms.kmeans.centroids import (
    PLUS_PLUS_CLUSTERS,
    ClusterSums,
    RowReader,
    centroids_of_sums,
    choose_seeds,
    rows_as_centroids,
)
from clipcid_cli.algorithms.kmeans.coarse import CoarseCentroids, CoarseRows, are_local
from clipcid_cli.algorithms.near.block import Block, make_block
from clipcid_cli.algorithms.near.exact import LONGEST_UNIT_ROW, DoubleArray, IntArray, exact_dots, fold_sum, root
from clipcid_cli.algorithms.near.nearest import PRODUCT_ROWS, Found, NearestCentroid

# Rows read and prepared at once. On a CPU a run is computed by a thread, which is 1.3 times as fast as all threads on each
# of its operations (60,000 rows, 2,048 centroids, 2 threads).
_RUN_ROWS = {"cpu": 8192, "cuda": 131_072}
# Centroids moved at once: on a CPU they stay near the caches, which takes a fifth of the time.
_CENTROIDS_AT_ONCE = {"cpu": 512, "cuda": 16_384}
# With fewer centroids to compare with, more than a block of rows is multiplied at once.
_FEW_CENTROIDS = 1024
_MOST_BLOCKS = 8
# Coarse iterations: the largest part of all, and of the centroids, the part that moves at least.
_MOST_COARSE = 0.75
_LEAST_MOVED = 0.1
_ROWS_TO_JUDGE = 2048
# Loose iterations: one in so many, the factor of what is subtracted at first, and the least |S| − s.
_ONE_LOOSE_IN = 6
_LOOSENESS = 16.0
_LEAST_REST = 0.3

# Bounds: the part θ; what covers the rounding of the movements.
_SHARE_OF_GAP = 0.5
_ROUNDED_UP = 1 + 1e-9

Prepared = TypeVar("Prepared", CoarseRows, Block)


@dataclasses.dataclass(frozen=True)
class LloydState:
    """Centroids after some iterations."""

    centroids_KD: torch.Tensor  # unit rows on the grid, float32 [K, D], on the CPU
    iterations: int = 0
    converged: bool = False  # whether the last iteration left every centroid where it was
    similarity: float = math.nan  # mean similarity of the rows to the centroids that the last iteration made of them
    num_empty: int = 0  # clusters without a row in the last iteration
    resumable: bool = True  # whether a run that begins here goes on as this one does


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
    # Of prepared rows, how much is kept from iteration to iteration; others are read and prepared anew.
    kept_bytes: int = 2**31


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Which iterations are coarse, and how loose these are; by default none is coarse."""

    num_coarse: int = 0  # the most there may be
    num_loose: int = 0  # the first of those
    grouped: bool = False  # whether they compare rows with centroids around their own only

    @classmethod
    def of(cls, iterations: int, *, grouped: bool) -> _Schedule:
        """Plan a run of at most so many iterations."""
        num_loose = iterations // _ONE_LOOSE_IN
        return cls(int(_MOST_COARSE * iterations) if grouped else num_loose, num_loose, grouped)

    def looseness(self, done: int) -> float:
        """Return the looseness of the coarse iteration that follows `done` ones."""
        return _LOOSENESS * (1 - done / self.num_loose) if done < self.num_loose else 0.0

    def stays_coarse(self, done: int, num_moved: int, num_clusters: int) -> bool:
        """Tell whether another coarse iteration follows `done` ones, the last of which moved `num_moved` centroids."""
        return done < self.num_coarse and (done < self.num_loose or num_moved >= _LEAST_MOVED * num_clusters)


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

    Memory: 12·K·D bytes for centroids and sums, those of the centroids' copy while rows are assigned, 16 a row, and kept
    rows.

    Args:
        iterations: Most iterations in all, those of `state` included.
        dtype: Format of the product that proposes, see `NearestCentroid`.

    Yields:
        The state after each iteration, the same on every process. The next iteration may overwrite its centroids.
    """
    mine = _RankRows(rows, len(state.centroids_KD), dtype, device, processes)
    centroids_KD = state.centroids_KD.to(device, copy=True)
    drift = None
    similarity_K = None
    # A resumed run makes no coarse iterations: they need the clusters before them.
    is_new = state.iterations == 0 and len(centroids_KD) > PLUS_PLUS_CLUSTERS
    schedule = _Schedule.of(iterations, grouped=mine.are_local(centroids_KD)) if is_new else _Schedule()
    coarse = schedule.num_coarse > 0
    while state.iterations < iterations and not state.converged:
        if coarse:
            looseness = schedule.looseness(state.iterations)
            mine.assign_coarsely(centroids_KD, similarity_K, looseness, grouped=schedule.grouped)
        else:
            mine.assign(centroids_KD, drift)
        empty_E = (processes.sum_(mine.sums.counts_K.clone()) == 0).nonzero()[:, 0]
        seeds_SD = mine.farthest_rows(len(empty_E)) if len(empty_E) else centroids_KD[:0]
        similarity_K, moved_K = _move(centroids_KD, mine.sums.sums_KD, empty_E[: len(seeds_SD)], seeds_SD, processes)
        num_moved = int(moved_K.count_nonzero())
        done = state.iterations + 1
        converged = not coarse and num_moved == 0
        drift = None if coarse else CentroidDrift.of(moved_K)
        coarse = coarse and schedule.stays_coarse(done, num_moved, len(moved_K))
        similarity = float(fold_sum(similarity_K[None])[0]) / len(rows)
        state = LloydState(centroids_KD.cpu(), done, converged, similarity, len(empty_E), resumable=not coarse)
        yield state


class _RankRows:
    """A process's share of the rows: their clusters, and the sums of those."""

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
        # What is known of the nearest centroids, in as few bytes as serve.
        self._label_N = torch.empty(size, dtype=torch.int32, device=device)
        self._cosine_N = torch.empty(size, dtype=torch.float64, device=device)
        self._others_N = torch.empty(size, dtype=torch.float32, device=device)
        self._changing = threading.Lock()  # of sums, which runs share
        self._is_summed = False
        self._coarse_rows = dict[int, CoarseRows]()
        self._blocks = dict[int, Block]()

    def are_local(self, centroids_KD: torch.Tensor) -> bool:
        """Tell of rows from all over the data whether comparing with centroids around their own is enough."""
        numbers = np.linspace(0, len(self._rows) - 1, min(len(self._rows), _ROWS_TO_JUDGE), dtype=np.int64)
        stored = torch.from_numpy(self._rows.features(numbers)).to(self._device)
        return are_local(CoarseRows.of(stored, self._dtype), centroids_KD, self._dtype)

    def assign_coarsely(
        self, centroids_KD: torch.Tensor, lengths_K: torch.Tensor | None, looseness: float, *, grouped: bool
    ) -> None:
        """Put all rows into clusters whose centroids are nearly the nearest, where similarities to their own are lowered.

        Args:
            lengths_K: Lengths of the sums of which the centroids were made, float64 [K]; None: rows have no cluster yet.
            looseness: How often that by which a row holds itself in its cluster is subtracted.
            grouped: Whether rows are compared with centroids around their own only.
        """
        coarse = CoarseCentroids(centroids_KD, self._dtype, grouped=grouped)

        def assign_run(first: int) -> None:
            rows = self._load_coarse(first)
            place = self._places(first)
            if lengths_K is None:
                number_B, self._cosine_N[place] = coarse.nearest(rows)
            else:
                own_B = self._label_N[place].long()
                number_B, cosine_B, own_cosine_B = coarse.nearest_other(rows, own_B)
                rest_B = (lengths_K[own_B] - own_cosine_B).clamp(min=_LEAST_REST)
                stays_B = own_cosine_B - looseness * (1.0 - own_cosine_B.square()) / rest_B >= cosine_B
                number_B = torch.where(stays_B, own_B, number_B)
                self._cosine_N[place] = torch.where(stays_B, own_cosine_B, cosine_B)
            self._put(first, rows.stored_BD, number_B)

        self._compute(assign_run)

    def assign(self, centroids_KD: torch.Tensor, drift: CentroidDrift | None) -> None:
        """Find the nearest centroids of all rows; `drift` is since the last call, None where that did not find them."""
        self._coarse_rows.clear()
        nearest = NearestCentroid(centroids_KD, self._dtype, None if drift is None else drift.order_K)
        if drift is None:
            self._compute(partial(self._assign_all, nearest))
        else:
            self._compute(partial(self._assign_again, nearest, centroids_KD, drift))

    def _compute(self, assign_run: Callable[[int], None]) -> None:
        for _ in self._processes.map_runs(assign_run, self._runs):
            pass
        self._is_summed = True

    def _assign_all(self, nearest: NearestCentroid, first: int) -> None:
        """Compare rows of a run with all centroids."""
        block = self._load(first)
        size = PRODUCT_ROWS[self._device.type]
        parts = torch.split(torch.arange(len(block), device=self._device), size)
        self._keep(first, block, Found.join([nearest.of(block, which_B) for which_B in parts]))

    def _assign_again(
        self, nearest: NearestCentroid, centroids_KD: torch.Tensor, drift: CentroidDrift, first: int
    ) -> None:
        """Compare rows of a run with the centroids that may have become nearer than their own."""
        place = self._places(first)
        before_B = self._label_N[place].long()
        similar_B = self._cosine_N[place]
        others_B = torch.minimum(self._others_N[place].double(), similar_B)  # the nearest was at least as near
        cosine_B = similar_B.clone()
        block = None
        moved_B = drift.moved_K[before_B].nonzero()[:, 0]
        if len(moved_B):
            block = self._load(first)
            cosine_B[moved_B] = exact_dots(block.stored, centroids_KD, moved_B, before_B[moved_B])
        count_B = drift.leading(similar_B, cosine_B, others_B)
        found = Found(before_B, cosine_B, others_B + drift.reach_K[0])
        for row_R, leading in _pieces(count_B, PRODUCT_ROWS[self._device.type]):
            block = block or self._load(first)
            now = nearest.of(block, row_R, found.at(row_R), leading)
            found.number_B[row_R], found.cosine_B[row_R] = now.number_B, now.cosine_B
            found.others_B[row_R] = torch.maximum(now.others_B, others_B[row_R] + drift.reach_K[leading])
        self._keep(first, block, found)

    def _keep(self, first: int, block: Block | None, found: Found) -> None:
        place = self._places(first)
        # A bound below 4 remains one: rounding takes at most 2⁻²³ off.
        self._cosine_N[place] = found.cosine_B
        self._others_N[place] = (found.others_B + 2.0**-22).float()
        if block is not None:
            self._put(first, block.stored, found.number_B)

    def _put(self, first: int, stored: torch.Tensor, number_B: torch.Tensor) -> None:
        label_B = self._label_N[self._places(first)]
        if not self._is_summed:
            with self._changing:
                self.sums.move(stored, None, number_B)
        elif len(changed_B := (number_B != label_B).nonzero()[:, 0]):
            changed_BD = stored.index_select(0, changed_B)
            before_B = label_B[changed_B].long()
            with self._changing:
                self.sums.move(changed_BD, before_B, number_B[changed_B])
        label_B.copy_(number_B)

    def farthest_rows(self, count: int) -> torch.Tensor:
        """Find rows to re-seed empty clusters with; the same on every process. Float32 [≤ count, D], unit rows."""

        def choose(parts: Iterable[tuple[DoubleArray, IntArray]]) -> tuple[DoubleArray, IntArray]:
            similarity_P, number_P = (np.concatenate(found) for found in zip(*parts, strict=True))
            chosen = choose_seeds(similarity_P, number_P, self._rows.features, count)
            return similarity_P[chosen], number_P[chosen]

        def of_run(first: int) -> tuple[DoubleArray, IntArray]:
            cosine_B = self._cosine_N[self._places(first)].cpu().numpy()
            return choose([(cosine_B, np.arange(first, first + len(cosine_B)))])

        mine = choose([of_run(first) for first in self._runs] or [(np.empty(0), np.empty(0, np.int64))])
        return rows_as_centroids(self._rows, choose(self._processes.gather(mine))[1]).to(self._device)

    def _places(self, first: int) -> slice:
        return slice(first - self._runs.start, first - self._runs.start + self._runs.step)

    def _numbers(self, first: int) -> IntArray:
        return np.arange(first, min(self._stop, first + self._runs.step))

    def _load(self, first: int) -> Block:
        prepare = partial(make_block, self._numbers(first), scan_dtype=self._dtype)
        return self._load_as(self._blocks, first, prepare)

    def _load_coarse(self, first: int) -> CoarseRows:
        return self._load_as(self._coarse_rows, first, lambda stored: CoarseRows.of(stored, self._dtype))

    def _load_as(self, kept: dict[int, Prepared], first: int, prepare: Callable[[torch.Tensor], Prepared]) -> Prepared:
        """Read and prepare a run of rows, or return it as it was kept."""
        if first in kept:
            return kept[first]
        prepared = prepare(torch.from_numpy(self._rows.features(self._numbers(first))).to(self._device))
        if (len(kept) + 1) * prepared.num_bytes <= self._processes.kept_bytes:  # all runs but the last are as long
            kept[first] = prepared
        return prepared


def _pieces(count_B: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Group rows that must be compared with about equally many centroids.

    Args:
        count_B: Leading centroids that each row must be compared with; those of 0 are left out.
        size: Rows compared with many centroids at once.

    Yields:
        Positions of rows, and how many leading centroids to compare them with.
    """
    sorted_B, order_B = torch.sort(count_B, descending=True)
    sorted_B = sorted_B.cpu()  # a GPU is waited for once
    at = 0
    end = int((sorted_B > 0).sum())
    while at < end:
        leading = int(sorted_B[at])
        # Fewer centroids, more rows: not as many as there is room for, since each row may need fewer still.
        stop = min(end, at + size * max(1, min(_MOST_BLOCKS, _FEW_CENTROIDS // leading)))
        yield order_B[at:stop], leading
        at = stop


def _move(
    centroids_KD: torch.Tensor,
    sums_KD: torch.Tensor,
    seeded_S: torch.Tensor,
    seeds_SD: torch.Tensor,
    processes: Processes,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the sums of all processes into centroids, in place and some at a time; give some clusters a seed.

    Returns:
        The sum of the similarities of each cluster's rows to its centroid now, which is the length of their sum where that
        made the centroid, and how far each centroid moved, float64 [K].
    """
    similarity_K = torch.empty(len(centroids_KD), dtype=torch.float64, device=centroids_KD.device)
    moved_K = torch.empty_like(similarity_K)
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
        moved_K[part] = distances_moved(old_CD, new_CD)
        centroids_KD[part] = new_CD
    return similarity_K, moved_K


@dataclasses.dataclass(frozen=True)
class CentroidDrift:
    """How the centroids moved."""

    order_K: torch.Tensor  # numbers of the centroids, those that moved farthest first, int64 [K]
    moved_K: torch.Tensor  # which centroids moved at all, bool [K], by number
    # How much more similar a row can be to any centroid after the first n of the order than it was to any other than
    # its nearest, by n from 0 to K: float64 [K + 1]; −∞ after all K.
    reach_K: torch.Tensor

    @classmethod
    def of(cls, distances_K: torch.Tensor) -> CentroidDrift:
        reach_K, order_K = torch.sort(distances_K * (LONGEST_UNIT_ROW * _ROUNDED_UP), descending=True, stable=True)
        return cls(order_K, distances_K > 0, torch.cat([reach_K, torch.full_like(reach_K[:1], -torch.inf)]))

    def leading(self, before_B: torch.Tensor, now_B: torch.Tensor, others_B: torch.Tensor) -> torch.Tensor:
        """Tell how many of the centroids, in their order, rows must be compared with.

        Args:
            before_B: Similarity s to the nearest centroid before, float64 [B].
            now_B: Similarity s' to that centroid now, float64 [B].
            others_B: Bound u ≤ s of the similarity to any other centroid before, float64 [B].

        Returns:
            Numbers of centroids, int64 [B] in [0, K]. Those after them are less similar than the nearest; those after n, any
            number, are at most u plus ``reach_K[n]``.
        """
        gap_B = now_B - others_B
        count_B = torch.searchsorted(-self.reach_K[:-1], -_SHARE_OF_GAP * gap_B, right=True)
        return torch.where(gap_B > 0, count_B, torch.where(now_B >= before_B, self.moved_K.sum(), len(self.order_K)))


def distances_moved(before_KD: torch.Tensor, after_KD: torch.Tensor) -> torch.Tensor:
    """Return how far centroids moved, from float32 [K, D] each: float64 [K], 0 for those that did not and for no others."""
    return root(fold_sum((after_KD.double() - before_KD.double()).square()))
