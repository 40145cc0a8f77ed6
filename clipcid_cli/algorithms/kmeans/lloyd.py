"""Lloyd's iterations on all processes: each assigns its share of the rows, the sums of all make the next centroids.

An iteration is a function of the rows and the centroids alone (see `algorithms.kmeans`), so the centroids are all that a
checkpoint needs: a resumed run finds its labels and sums again by assigning, and ends with the same bytes.

The first iterations compare rows and centroids along the directions in which most of the rows' length lies
(`algorithms.subspace`), all others in full. After the first of either kind rows are compared with those centroids only
that may have become nearer than their own (`algorithms.moving_centroids`), and only rows that changed their cluster
change the sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans.best_so_far import Nearest
from clipcid_cli.algorithms.kmeans.bounds import CentroidDrift
from clipcid_cli.algorithms.kmeans.kmeans import ClusterSums, centroids_of_sums, distances_moved, sum_of_similarities
from clipcid_cli.algorithms.kmeans.leading_coordinates import LeadingCoordinates
from clipcid_cli.algorithms.kmeans.nearest import NearestCentroids
from clipcid_cli.algorithms.kmeans.prepared import PreparedRows, prepare_rows
from clipcid_cli.algorithms.kmeans.seeding import choose_first_rows, choose_seeds
from clipcid_cli.algorithms.kmeans.subspace import MOST_ROWS, Subspace
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import Precision, choose_precision, choose_scan
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.cluster.product_choice import TRIAL_ROWS, CoordinateChoice, worth_a_trial
from clipcid_cli.steps.cluster.rows import ClusterRows
from clipcid_cli.steps.reporting import Reporter

# Rows multiplied with centroids at once. On a CPU the products stay near the caches; a GPU wants more work at a time.
_BLOCK = {"cpu": 1024, "cuda": 16_384}
_FEW_CENTROIDS = 1024
# int8 gains most after the first iteration, when centroids stand among their rows: on rows without structure it takes
# as long as fp32 at first and half as long later.
_PATIENCE = 1.4
# Rows that are sorted by the number of centroids they must be compared with, and read at once.
_RUN = {"cpu": 16_384, "cuda": 131_072}
_CENTROIDS_AT_ONCE = 16_384
# The start in a short space: directions, the shares of squared length along them that make it worth while (of all rows, and
# of nine rows in ten), and what is large enough for it. On 100,000 rows and 4,096 centroids 3 of 20 iterations in 64 of 512
# directions saved a fifth to a third of the time and ended 0.2 to 1.3 % better where these held 45 to 92 %, 4.6 % worse
# where they held 20 %. Rows outside the directions are served badly: with 20 to 40 % of them it ended 0.5 to 1.1 % worse.
SHORT_WIDTH = 64
_SHORT_ITERATIONS = 3
_SHORT_PART = 4
_LEAST_SHARE = 0.4
_LEAST_LOW_SHARE = 0.25
_SHORT_CENTROIDS = 1024
# Prepared rows that a process keeps from iteration to iteration; beyond them rows are read and cast anew each time.
KEPT_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class LloydState:
    """Centroids after some iterations.

    Attributes:
        centroids_KD: Unit rows on the grid, float32 [K, D], on the CPU.
        converged: Whether the last one left every centroid where it was.
    """

    centroids_KD: torch.Tensor
    iterations: int
    converged: bool


def block_bounds(machine: Machine, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows start … stop − 1 into blocks of the size that suits the device."""
    size = _BLOCK[machine.device.type]
    for first in range(start, stop, size):
        yield first, min(stop, first + size)


def load_rows(
    rows: npt.NDArray[np.float16],
    machine: Machine,
    dtype: torch.dtype,
    coordinates: LeadingCoordinates | None = None,
) -> PreparedRows:
    """Bring mapped rows to the device, ready for a search in `dtype` (of some coordinates)."""
    return prepare_rows(torch.from_numpy(np.array(rows)).to(machine.device), dtype, coordinates)


def first_centroids(rows: ClusterRows, num_clusters: int, seed: int) -> torch.Tensor:
    """Choose the first centroids, float32 [K, D] on the CPU; a function of rows, K and seed."""

    def read(positions: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(rows.features_at(positions))

    return _unit_centroids(rows, choose_first_rows(read, len(rows), num_clusters, seed))


def subspace_iterations(iterations: int) -> int:
    """Return how many of the iterations, the first, compare in a short space where there is one."""
    return min(_SHORT_ITERATIONS, iterations // _SHORT_PART)


def find_subspace(rows: ClusterRows, num_clusters: int) -> Subspace | None:
    """Find the directions in which the first iterations compare; None where they would not gain from it.

    A function of the rows and K.
    """
    if num_clusters < _SHORT_CENTROIDS or rows.width < 4 * SHORT_WIDTH:
        return None
    places = np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS), dtype=np.int64)
    short = Subspace.of(torch.from_numpy(rows.features_at(places)), SHORT_WIDTH)
    return short if short.share >= _LEAST_SHARE and short.low_share >= _LEAST_LOW_SHARE else None


def choose_format(requested: str, rows: ClusterRows, machine: Machine, centroids_KD: torch.Tensor) -> Precision:
    """Choose the format of the product that discards; the result is the same in each.

    int8 multiplies several times as fast as fp32, but where many centroids are about equally near it leaves so many to
    decide that fp32 is faster: both are tried on a block of rows.

    Args:
        requested: What the user asks for.
        centroids_KD: First centroids, float32 [K, D].
    """
    scan = choose_scan(requested, machine.device)
    other = choose_precision(requested, machine.device, "embed", parameters=0)
    if scan.dtype == other.dtype:
        return scan
    centroids_KD = centroids_KD[:_CENTROIDS_AT_ONCE].to(machine.device)
    seconds = {}
    for precision in (scan, other):
        search = NearestCentroids(centroids_KD, precision.dtype)
        block = load_rows(rows.features(0, min(len(rows), _BLOCK[machine.device.type])), machine, precision.dtype)
        seconds[precision.name] = time_trial(partial(search.nearest, block), machine.device).seconds
    if seconds[scan.name] <= _PATIENCE * seconds[other.name]:
        return scan
    return dataclasses.replace(
        other, reason=f"{seconds[scan.name] / seconds[other.name]:.1f} times as fast here as int8"
    )


def run_lloyd(
    rows: ClusterRows,
    machine: Machine,
    state: LloydState,
    *,
    iterations: int,
    dtype: torch.dtype,
    save: Callable[[LloydState], None],
    reporter: Reporter,
) -> LloydState:
    """Iterate until no centroid moves, or `iterations` are done.

    Args:
        rows: The rows of all processes.
        machine: The processes; this one takes its even share of the rows.
        state: Where to begin; its centroids are updated in place.
        iterations: Most iterations in all, those of `state` included.
        dtype: Precision of the product that discards, see `NearestCentroids`.
        save: Called on the first process after each iteration.
    """
    num_short = subspace_iterations(iterations)
    short = machine.on_main(lambda: find_subspace(rows, len(state.centroids_KD))) if num_short else None
    lloyd = _Lloyd(rows, machine, dtype, state.centroids_KD, short is not None, reporter)
    if short is not None:
        if machine.is_main and state.iterations < num_short:
            which = "The first iteration compares" if num_short == 1 else f"The first {num_short} iterations compare"
            reporter.note(
                f"{which} images along {SHORT_WIDTH} of {rows.width} directions, which hold {short.share:.0%} of "
                "their squared length; the others compare in full."
            )
        short = short.to(machine.device)
    with reporter.progress("k-means", iterations - state.iterations, "iterations") as progress:
        while state.iterations < iterations and not state.converged:
            here = short if state.iterations < num_short else None
            objective, num_empty = lloyd.iterate(here)
            state = LloydState(
                lloyd.centroids_KD.cpu(), state.iterations + 1, converged=here is None and not lloyd.any_moved
            )
            if machine.is_main:
                save(state)
            progress.advance()
            progress.show(similarity=objective, **({"empty": num_empty} if num_empty else {}))
    return state


class _Lloyd:
    """This process's share of the rows, with what is known of them from the last iteration.

    Memory: 12·K·D bytes for centroids and sums, those of the centroids' copy while rows are assigned, 24 a row, and
        kept rows.
    """

    def __init__(
        self,
        rows: ClusterRows,
        machine: Machine,
        dtype: torch.dtype,
        centroids_KD: torch.Tensor,
        starts_short: bool,
        reporter: Reporter,
    ) -> None:
        self.rows, self.machine, self.dtype, self.reporter = rows, machine, dtype, reporter
        # After a start in a short space centroids are means from the first comparison in full on.
        self.coordinates = CoordinateChoice(dtype, machine, trials=1 if starts_short else 2)
        self.short: Subspace | None = None
        self.start = len(rows) * machine.rank // machine.size
        self.stop = len(rows) * (machine.rank + 1) // machine.size
        self.centroids_KD = centroids_KD.to(machine.device)
        self.sums = ClusterSums(len(centroids_KD), rows.width, machine.device)
        number = self.stop - self.start
        self.nearest = Nearest(
            torch.full((number,), -1, dtype=torch.int64, device=machine.device),
            torch.empty(number, dtype=torch.float64, device=machine.device),
            torch.empty(number, dtype=torch.float64, device=machine.device),
        )
        self.movement: CentroidDrift | None = None
        self.kept: dict[int, PreparedRows] = {}
        self.kept_bytes = 0

    @property
    def any_moved(self) -> bool:
        """Whether the last iteration moved a centroid."""
        return self.movement is None or bool(self.movement.moved_K.any())

    def iterate(self, short: Subspace | None = None) -> tuple[float, int]:
        """Do one iteration.

        Args:
            short: Where rows and centroids are compared, on the device; in full without.

        Returns:
            The mean similarity to the centroids as they were, and the number of empty clusters; the same on every process.
        """
        if short is not self.short:
            # Similarities and movements were of the other space; the clusters of the rows stay as they are.
            self.short, self.movement = short, None
            self.kept, self.kept_bytes = {}, 0
        if short is None:
            self._choose_coordinates()
        compared_KD = self.centroids_KD if short is None else short.centroids(self.centroids_KD)
        order_K = None if self.movement is None else self.movement.order_K
        search = NearestCentroids(compared_KD, self.dtype, order_K, self.coordinates.chosen)
        size = _RUN[self.machine.device.type]
        for first in range(self.start, self.stop, size):
            self._assign(search, first, min(self.stop, first + size))
        del search
        counts_K = self.machine.sum_(self.sums.counts_K.clone())
        empty = (counts_K == 0).nonzero()[:, 0]
        # Which rows are far from every centroid is known in full only.
        seeds_KD = self._farthest_rows(len(empty)) if len(empty) and short is None else self.centroids_KD[:0]
        return self._move_centroids(empty[: len(seeds_KD)], seeds_KD) / len(self.rows), len(empty)

    def _assign(self, search: NearestCentroids, first: int, last: int) -> None:
        """Find the nearest centroids of a run of rows and bring the sums up to date."""
        mine = self.nearest.chosen(slice(first - self.start, last - self.start))
        before_B = mine.centroids_B.clone()
        is_known = bool((before_B >= 0).all())
        rows: PreparedRows | None = None
        if self.movement is None:
            count_B = torch.full_like(before_B, len(self.centroids_KD))
            if is_known:
                rows, every_B = self._prepared(first, last), torch.arange(len(before_B), device=before_B.device)
                mine.similarities_B[:] = search.similarities(rows.rows_BD, every_B, before_B)
                mine.others_B.fill_(-torch.inf)
        else:
            away_B = self.movement.moved_K[before_B].nonzero()[:, 0]
            now_B = mine.similarities_B.clone()
            if len(away_B):
                rows = self._prepared(first, last)
                now_B[away_B] = search.similarities(rows.rows_BD, away_B, before_B[away_B])
            count_B, rest_B = self.movement.leading(mine.similarities_B, now_B, mine.others_B)
            mine.similarities_B[:], mine.others_B[:] = now_B, rest_B
        if not bool(count_B.any()):
            return
        if rows is None:
            rows = self._prepared(first, last)
        for piece, leading in self._pieces(count_B):
            known = mine.chosen(piece) if is_known else None
            found = search.nearest(rows.chosen(piece), known, leading)
            mine.centroids_B[piece], mine.similarities_B[piece] = found.centroids_B, found.similarities_B
            others_B = found.others_B if known is None else torch.maximum(found.others_B, known.others_B)
            mine.others_B[piece] = others_B
        if not torch.equal(mine.centroids_B, before_B):
            rows_BD = rows.rows_BD if self.short is None else self._read(first, last)
            self.sums.move(rows_BD, before_B, mine.centroids_B)

    def _choose_coordinates(self) -> None:
        """Try by how many coordinates rows are compared fastest: with the first centroids, and once they are means."""
        share = self.stop - self.start
        if not self.coordinates.is_open or not worth_a_trial(
            share, len(self.centroids_KD), self.rows.width, KEPT_BYTES
        ):
            return
        places = np.linspace(0, share - 1, min(share, TRIAL_ROWS), dtype=np.int64)
        rows_BD = torch.from_numpy(self.rows.features_at(self.start + places)).to(self.machine.device)
        known = self.nearest.chosen(torch.from_numpy(places))
        is_known = bool((known.centroids_B >= 0).all())
        if self.coordinates.choose(rows_BD, share, self.centroids_KD, known if is_known else None):
            self.kept, self.kept_bytes = {}, 0
            chosen = self.coordinates.chosen
            if chosen is not None and self.machine.is_main:
                self.reporter.note(
                    f"Most of the images' length lies along {chosen.width - 1} of {self.rows.width} directions: only what "
                    "these cannot tell apart is compared in full."
                )

    def _pieces(self, count_B: torch.Tensor) -> Iterator[tuple[torch.Tensor | slice, int]]:
        """Cut rows into pieces that are multiplied at once: which rows, and the number of leading centroids for all."""
        size = _BLOCK[self.machine.device.type]
        if self.movement is None:
            for at in range(0, len(count_B), size):
                yield slice(at, at + size), len(self.centroids_KD)
            return
        sorted_B, order_B = torch.sort(count_B, descending=True)
        at, end = 0, int((sorted_B > 0).sum())
        while at < end:
            leading = int(sorted_B[at])
            # Fewer centroids, more rows: not as many as there is room for, since each row may need fewer still.
            stop = min(end, at + size * max(1, min(8, _FEW_CENTROIDS // leading)))
            yield order_B[at:stop], leading
            at = stop

    def _prepared(self, first: int, last: int) -> PreparedRows:
        """Return a run of rows: kept from the iteration before while there is room, else read and prepared again."""
        rows = self.kept.get(first)
        if rows is None:
            rows_BD = self._read(first, last)
            if self.short is not None:
                rows_BD = self.short.rows(rows_BD)
            rows = prepare_rows(rows_BD, self.dtype, self.coordinates.chosen)
            if self.kept_bytes + rows.num_bytes <= KEPT_BYTES:
                self.kept[first] = rows
                self.kept_bytes += rows.num_bytes
        return rows

    def _move_centroids(self, seeded: torch.Tensor, seeds_KD: torch.Tensor) -> float:
        """Turn the sums of all processes into centroids, some at a time, and give seeds to some clusters.

        Returns:
            The sum of the similarities of all rows to the centroids as they were.
        """
        total = 0.0
        distances_K = torch.empty(len(self.centroids_KD), dtype=torch.float64, device=self.machine.device)
        for first in range(0, len(self.centroids_KD), _CENTROIDS_AT_ONCE):
            part = slice(first, first + _CENTROIDS_AT_ONCE)
            old_CD = self.centroids_KD[part]
            sums_CD = self.machine.sum_(self.sums.sums_KD[part].clone())
            total += sum_of_similarities(sums_CD, old_CD)
            new_CD = centroids_of_sums(sums_CD, old_CD)
            here = (seeded >= first) & (seeded < first + _CENTROIDS_AT_ONCE)
            new_CD[seeded[here] - first] = seeds_KD[here]
            distances_K[part] = self._distances_moved(old_CD, new_CD)
            old_CD.copy_(new_CD)
        self.movement = CentroidDrift.of(distances_K)
        return total

    def _distances_moved(self, old_CD: torch.Tensor, new_CD: torch.Tensor) -> torch.Tensor:
        if self.short is None:
            return distances_moved(old_CD, new_CD)
        return distances_moved(self.short.centroids(old_CD), self.short.centroids(new_CD))

    def _farthest_rows(self, count: int) -> torch.Tensor:
        """Find rows to re-seed empty clusters with; the same on every process. Float32 [≤ count, D], unit rows."""
        similarities = self.nearest.similarities_B.cpu().numpy()
        numbers = np.arange(self.start, self.stop, dtype=np.int64)
        local = choose_seeds(similarities, numbers, self._read_row, count)
        gathered = self.machine.gather((similarities[local], numbers[local]))
        all_similarities, all_numbers = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
        chosen = all_numbers[choose_seeds(all_similarities, all_numbers, self._read_row, count)]
        return _unit_centroids(self.rows, chosen).to(self.machine.device)

    def _read(self, first: int, last: int) -> torch.Tensor:
        """Read a run of rows in full, float16 [B, D]."""
        return torch.from_numpy(np.array(self.rows.features(first, last))).to(self.machine.device)

    def _read_row(self, number: int) -> npt.NDArray[np.float16]:
        row: npt.NDArray[np.float16] = self.rows.features(number, number + 1)[0]
        return row


def _unit_centroids(rows: ClusterRows, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
    """Read single rows as centroids, float32 [K, D]."""
    centroids_KD = torch.zeros(len(numbers), rows.width)
    for first in range(0, len(numbers), _CENTROIDS_AT_ONCE):
        part = slice(first, first + _CENTROIDS_AT_ONCE)
        chosen_CD = torch.from_numpy(rows.features_at(numbers[part])).double()
        centroids_KD[part] = centroids_of_sums(chosen_CD, centroids_KD[part])
    return centroids_KD
