"""Lloyd's iterations of spherical k-means over rows shared among processes.

Each process assigns its share of the rows; the sums of all make the next centroids. An iteration is a function of the rows
and the centroids alone (:mod:`clipcid_cli.algorithms.kmeans.kmeans`), so the centroids are all that a checkpoint needs: a
resumed run finds its labels and sums again by assigning, and ends with the same bytes.

The first iterations compare rows and centroids along few directions that hold most of the rows' length
(:mod:`clipcid_cli.algorithms.kmeans.start`), all others in full. After the first of those, rows are compared only with
centroids that may have become nearer than their own (:mod:`clipcid_cli.algorithms.kmeans.bounds`), and only rows that
changed their cluster change the sums.

Shape letters: B rows of a run, K centroids, C centroids of a part, D width.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans.best_so_far import Nearest
from clipcid_cli.algorithms.kmeans.bounds import CentroidDrift, distances_moved
from clipcid_cli.algorithms.kmeans.kept_runs import KeptRuns, Room
from clipcid_cli.algorithms.kmeans.kmeans import RowReader, sums_of_similarities
from clipcid_cli.algorithms.kmeans.nearest import BLOCK_ROWS, GROUP, NearestCentroids
from clipcid_cli.algorithms.kmeans.prepared import PreparedRows, prepare_rows
from clipcid_cli.algorithms.kmeans.seeding import choose_seeds, rows_as_centroids
from clipcid_cli.algorithms.kmeans.start import SubspaceIterations
from clipcid_cli.algorithms.kmeans.subspace import Subspace, subspace_iterations
from clipcid_cli.algorithms.near.centroids import ClusterSums, centroids_of_sums, fold_sum

# Computes runs of rows, one or several at once, and returns in their order.
MapRuns = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]

# Rows read at once and sorted by the number of centroids they must be compared with. On a CPU a run is computed by a
# thread, which is 1.3 times as fast as all threads on each of its operations (60,000 rows, 2,048 centroids, 2 threads).
_RUN_ROWS = {"cpu": 8192, "cuda": 131_072}
_CENTROIDS_AT_ONCE = 16_384
# With fewer centroids to compare with, more than a block of rows is multiplied at once.
_FEW_CENTROIDS = 1024
_MOST_BLOCKS = 8
# With so few for every row of a run, all its rows are compared with as many.
_SO_FEW_CENTROIDS = 256
# Rows that seeds are chosen from at once.
_SEEDS_FROM = 2**20


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


def run_lloyd(
    rows: RowReader,
    state: LloydState,
    *,
    iterations: int,
    dtype: torch.dtype,
    device: torch.device,
    share: tuple[int, int],
    subspace: Subspace | None,
    kept_bytes: int,
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
    gather: Callable[[Any], list[Any]],
    map_runs: MapRuns = map,
) -> Iterator[LloydState]:
    """Iterate until no centroid moves, or `iterations` are done.

    Args:
        rows: The rows of all processes.
        state: Where to begin.
        iterations: Most iterations in all, those of `state` included.
        dtype: Format of the product that discards, see `NearestCentroids`.
        share: First row of this process and the row after its last.
        subspace: Where the first iterations compare, a state after all of them; None compares in full from the start.
        kept_bytes: Rows that this process keeps from iteration to iteration, coded or prepared; others are read and cast
            anew each time.
        sum_over_processes: Returns the sum of a tensor over all processes; may change its argument.
        gather: Returns every process's value, in the same order on every process.
        map_runs: As the built-in; may compute several runs of rows at once, a thread each.

    Yields:
        The state after each iteration, but after those along few directions only once; the same on every process. The next
        iteration may overwrite its centroids.
    """
    num_short = 0 if subspace is None else subspace_iterations(iterations)
    lloyd = Lloyd(rows, state.centroids_KD.to(device), dtype, share, kept_bytes, sum_over_processes, gather, map_runs)
    while state.iterations < iterations and not state.converged:
        if subspace is not None and state.iterations < num_short:
            similarity, num_empty = lloyd.iterate_along(subspace, num_short)
            # Where nothing moves along few directions, something may in full.
            state = LloydState(lloyd.centroids_KD.cpu(), num_short, False, similarity, num_empty)
        else:
            similarity, num_empty = lloyd.iterate()
            state = LloydState(
                lloyd.centroids_KD.cpu(), state.iterations + 1, not lloyd.any_moved, similarity, num_empty
            )
        yield state


class _CompactNearest:
    """The nearest centroids of a process's N rows from iteration to iteration, as few bytes as serve.

    Attributes:
        similarities_N: Exact similarities to them, float64 [N].
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self._centroids_N = torch.full((number,), -1, dtype=torch.int32, device=device)
        self.similarities_N = torch.empty(number, dtype=torch.float64, device=device)
        self._others_N = torch.empty(number, dtype=torch.float32, device=device)

    def read(self, which: slice) -> Nearest:
        """Return those of some rows: a copy of the centroids; similarities are the kept ones and change in place."""
        return Nearest(self._centroids_N[which].long(), self.similarities_N[which], self._others_N[which])

    def label(self, which: slice, centroids_B: torch.Tensor) -> None:
        """Keep centroids of some rows of which the similarities are not known."""
        self._centroids_N[which] = centroids_B

    def write(self, which: slice, nearest: Nearest) -> None:
        """Keep centroids and bounds of some rows. A bound, float64 below 4, remains one: rounding takes at most 2⁻²³ off."""
        self._centroids_N[which] = nearest.centroids_B
        self._others_N[which] = nearest.others_B + 2.0**-22


class Lloyd:
    """A process's share of the rows, with what is known of them from the last iteration.

    Memory: 12·K·D bytes for centroids and sums, those of the centroids' copy while rows are assigned, 16 a row, and kept
        rows.

    Args:
        rows: The rows of all processes.
        centroids_KD: Unit rows on the grid, float32 [K, D], on the device to compute on; updated in place.
        dtype: As for :func:`run_lloyd`, and so are the others.
    """

    def __init__(
        self,
        rows: RowReader,
        centroids_KD: torch.Tensor,
        dtype: torch.dtype,
        share: tuple[int, int],
        kept_bytes: int,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
        gather: Callable[[Any], list[Any]],
        map_runs: MapRuns = map,
    ) -> None:
        self.centroids_KD = centroids_KD
        self._rows, self._dtype, self._device = rows, dtype, centroids_KD.device
        self._start, self._stop = share
        self._sum, self._gather, self._map_runs = sum_over_processes, gather, map_runs
        self._sums = ClusterSums(len(centroids_KD), rows.width, self._device)
        number = self._stop - self._start
        self._nearest = _CompactNearest(number, self._device)
        # Of all rows of each cluster to its centroid, added up.
        self._similarities_K = torch.zeros(len(centroids_KD), dtype=torch.float64, device=self._device)
        self._drift: CentroidDrift | None = None
        self._is_labelled = False
        self._room = Room(kept_bytes)
        self._prepared = KeptRuns(lambda first: prepare_rows(self._read(first), dtype), self._room)
        self._changing = threading.Lock()  # of sums, which runs share

    @property
    def any_moved(self) -> bool:
        """Whether the last iteration moved a centroid."""
        return self._drift is None or bool(self._drift.moved_K.any())

    def iterate_along(self, subspace: Subspace, iterations: int) -> tuple[float, int]:
        """Do the first iterations, along few directions; nothing may have been done before.

        Empty clusters keep their centroid: only similarities in full tell which rows are far from every centroid.

        Returns:
            As :meth:`iterate`.
        """
        start = SubspaceIterations(
            self._read,
            self._runs,
            self.centroids_KD,
            subspace,
            dtype=self._dtype,
            room=self._room,
            sum_over_processes=self._sum,
            map_runs=self._map_runs,
        )
        for _ in range(iterations - 1):
            start.iterate()

        def assign(first: int) -> None:
            labels_B = start.last_labels(first)  # makes room for the rows
            rows = self._prepared.get(first)
            self._nearest.label(self._places(first), labels_B)
            with self._changing:
                self._sums.move(rows.rows_BD, None, labels_B)

        self._compute(assign)
        empty = self._empty_clusters()
        similarity = self._move_centroids(empty[:0], self.centroids_KD[:0])
        self._drift, self._is_labelled = None, True  # but how similar rows are is not known
        return similarity, len(empty)

    def iterate(self) -> tuple[float, int]:
        """Do one iteration.

        Returns:
            The mean similarity to the new centroids and the number of clusters without a row; the same on every process.
        """
        self._assign_all()
        empty = self._empty_clusters()
        seeds_KD = self._farthest_rows(len(empty)) if len(empty) else self.centroids_KD[:0]
        return self._move_centroids(empty[: len(seeds_KD)], seeds_KD), len(empty)

    @property
    def _runs(self) -> range:
        """Numbers of the first rows of all runs."""
        return range(self._start, self._stop, _RUN_ROWS[self._device.type])

    def _places(self, first: int) -> slice:
        """Return where a run is among the rows of this process."""
        return slice(first - self._start, min(self._stop, first + self._runs.step) - self._start)

    def _compute(self, assign: Callable[[int], None]) -> None:
        for _ in self._map_runs(assign, self._runs):
            pass

    def _empty_clusters(self) -> torch.Tensor:
        return (self._sum(self._sums.counts_K.clone()) == 0).nonzero()[:, 0]

    def _assign_all(self) -> None:
        """Find the nearest centroids of all rows; the copy of the centroids is freed before what follows."""
        search = NearestCentroids(self.centroids_KD, self._dtype, None if self._drift is None else self._drift.order_K)
        self._compute(lambda first: self._assign(search, first))
        self._is_labelled = True

    def _assign(self, search: NearestCentroids, first: int) -> None:
        """Find the nearest centroids of a run of rows and update the sums."""
        mine = self._nearest.read(self._places(first))
        before_B, others_B = mine.centroids_B.clone(), mine.others_B
        rows: PreparedRows | None = None

        # How many centroids, the leading ones of the search's order, must each row be compared with?
        if self._drift is None:
            count_B = torch.full_like(before_B, len(self.centroids_KD))
            mine = dataclasses.replace(mine, others_B=torch.empty_like(mine.similarities_B))
        else:
            moved_B = self._with_moved_centroids(first, before_B)
            similar_B = mine.similarities_B.clone()
            if len(moved_B):
                rows = self._prepared.get(first)
                mine.similarities_B[moved_B] = search.similarities(rows.rows_BD, moved_B, before_B[moved_B])
            others_B = torch.minimum(others_B, similar_B)  # the nearest was at least as near as any other
            count_B = self._drift.leading(similar_B, mine.similarities_B, others_B)
            mine = dataclasses.replace(mine, others_B=others_B + self._drift.reach_K[0])

        # Compare: centroids looked at now and bounds of those that were not give the new nearest and its bound.
        for piece, leading in self._pieces(count_B):
            rows = rows or self._prepared.get(first)
            found = search.nearest(rows.chosen(piece), None if self._drift is None else mine.chosen(piece), leading)
            mine.centroids_B[piece], mine.similarities_B[piece] = found.centroids_B, found.similarities_B
            mine.others_B[piece] = found.others_B
            if self._drift is not None:
                mine.others_B[piece] = torch.maximum(found.others_B, others_B[piece] + self._drift.reach_K[leading])
        self._nearest.write(self._places(first), mine)

        changed_B = (mine.centroids_B != before_B).nonzero()[:, 0]
        if rows is not None and len(changed_B):
            changed_BD = rows.rows_BD.index_select(0, changed_B)
            with self._changing:
                self._sums.move(
                    changed_BD, before_B[changed_B] if self._is_labelled else None, mine.centroids_B[changed_B]
                )

    def _with_moved_centroids(self, first: int, before_B: torch.Tensor) -> torch.Tensor:
        """List rows of a run whose similarity to their centroid may have changed, int64 [n].

        On a GPU all rows of a run that is kept: to compute them takes less time than to wait. Others would have to be read.
        """
        assert self._drift is not None
        if before_B.is_cuda and first in self._prepared:
            return torch.arange(len(before_B), device=before_B.device)
        return self._drift.moved_K[before_B].nonzero()[:, 0]

    def _pieces(self, count_B: torch.Tensor) -> Iterator[tuple[torch.Tensor | slice, int]]:
        """Cut rows into pieces that are multiplied at once: which rows, and the number of leading centroids for all."""
        size = BLOCK_ROWS[self._device.type]
        if self._drift is None:
            for at in range(0, len(count_B), size):
                yield slice(at, at + size), len(self.centroids_KD)
            return
        sorted_B, order_B = torch.sort(count_B, descending=True)
        sorted_B = sorted_B.cpu()  # a GPU is waited for once
        at, end = 0, int((sorted_B > 0).sum())
        # In their order where that takes less time than to pick them out: then all of them, wherever those to compare are.
        few = int(sorted_B[0]) <= _SO_FEW_CENTROIDS and 2 * end > len(sorted_B)
        end = len(sorted_B) if few else end
        while at < end:
            leading = int(sorted_B[0 if few else at])
            # Fewer centroids, more rows: not as many as there is room for, since each row may need fewer still.
            stop = min(end, at + size * max(1, min(_MOST_BLOCKS, _FEW_CENTROIDS // leading)))
            looked_at = min(-(-leading // GROUP) * GROUP, len(self.centroids_KD))
            yield (slice(at, stop) if few else order_B[at:stop]), looked_at
            at = stop

    def _read(self, first: int) -> torch.Tensor:
        """Read a run of rows, float16 [B, D]."""
        last = min(self._stop, first + self._runs.step)
        return torch.from_numpy(np.array(self._rows.features(first, last))).to(self._device)

    def _move_centroids(self, seeded: torch.Tensor, seeds_KD: torch.Tensor) -> float:
        """Turn the sums of all processes into centroids where they changed, some at a time; give seeds to some clusters.

        Args:
            seeded: Clusters that get a seed, int64 [S].
            seeds_KD: Their new centroids, float32 [S, D].

        Returns:
            The mean similarity of all rows to the centroids as they are now.
        """
        changed_K = self._sum(self._sums.changed_K.clone()) > 0
        self._sums.changed_K.zero_()
        if len(seeded):
            changed_K[seeded] = True
            place_K = torch.full_like(self._sums.counts_K, -1)
            place_K[seeded] = torch.arange(len(seeded), device=self._device)
        distances_K = torch.zeros(len(self.centroids_KD), dtype=torch.float64, device=self._device)
        for part in torch.split(changed_K.nonzero()[:, 0], _CENTROIDS_AT_ONCE):
            sums_CD, old_CD = self._sum(self._sums.sums_KD[part]), self.centroids_KD[part]
            new_CD = centroids_of_sums(sums_CD, old_CD)
            if len(seeded):
                place_C = place_K[part]
                new_CD[place_C >= 0] = seeds_KD[place_C[place_C >= 0]]
            distances_K[part] = distances_moved(old_CD, new_CD)
            self._similarities_K[part] = sums_of_similarities(sums_CD, new_CD)
            self.centroids_KD[part] = new_CD
        self._drift = CentroidDrift.of(distances_K)
        return float(fold_sum(self._similarities_K[None])[0]) / len(self._rows)

    def _farthest_rows(self, count: int) -> torch.Tensor:
        """Find rows to re-seed empty clusters with; the same on every process. Float32 [≤ count, D], unit rows."""
        similarities = self._nearest.similarities_N.cpu().numpy()
        numbers = np.empty(0, dtype=np.int64)
        for first in range(0, len(similarities), _SEEDS_FROM):
            more = np.arange(first, min(len(similarities), first + _SEEDS_FROM), dtype=np.int64) + self._start
            numbers = np.concatenate([numbers, more])
            numbers = numbers[choose_seeds(similarities[numbers - self._start], numbers, self._read_row, count)]
        gathered = self._gather((similarities[numbers - self._start], numbers))
        all_similarities, all_numbers = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
        chosen = all_numbers[choose_seeds(all_similarities, all_numbers, self._read_row, count)]
        return rows_as_centroids(self._rows, chosen).to(self._device)

    def _read_row(self, number: int) -> npt.NDArray[np.float16]:
        row: npt.NDArray[np.float16] = self._rows.features(number, number + 1)[0]
        return row
