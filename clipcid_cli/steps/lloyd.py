"""Lloyd's iterations on all processes: each assigns its share of the rows, the sums of all make the next centres.

An iteration is a function of the rows and the centres alone (see `algorithms.kmeans`), so the centres are all that a
checkpoint needs: a resumed run finds its labels and sums again by assigning, and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans import ClusterSums, centres_of_sums, sum_of_similarities
from clipcid_cli.algorithms.kmeans_seeding import choose_first_rows, choose_seeds
from clipcid_cli.algorithms.nearest_centres import NearestCentres, PreparedRows, prepare_rows
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.cluster_rows import ClusterRows
from clipcid_cli.steps.reporting import Reporter

# Rows multiplied with centres at once. On a CPU the products stay near the caches; a GPU wants more work at a time.
_BLOCK = {"cpu": 1024, "cuda": 16_384}
_SUMS_AT_ONCE = 65_536
# Prepared rows that a process keeps from iteration to iteration; beyond them rows are read and cast anew each time.
_KEPT_BYTES = 2**31


@dataclasses.dataclass(frozen=True)
class LloydState:
    """Centres after some iterations.

    Attributes:
        centres_KD: Unit rows on the grid, float32 [K, D], on the CPU.
        iterations: Iterations done.
        converged: Whether the last one left every centre where it was.
    """

    centres_KD: torch.Tensor
    iterations: int
    converged: bool


def block_bounds(machine: Machine, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows start … stop − 1 into blocks of the size that suits the device."""
    size = _BLOCK[machine.device.type]
    for first in range(start, stop, size):
        yield first, min(stop, first + size)


def load_rows(rows: npt.NDArray[np.float16], machine: Machine, dtype: torch.dtype) -> PreparedRows:
    """Bring mapped rows to the device, ready for a search in `dtype`."""
    return prepare_rows(torch.from_numpy(np.array(rows)).to(machine.device), dtype)


def first_centres(rows: ClusterRows, num_clusters: int, seed: int) -> torch.Tensor:
    """Choose the first centres, float32 [K, D] on the CPU; a function of rows, K and seed."""

    def read(positions: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(rows.features_at(positions))

    chosen = choose_first_rows(read, len(rows), num_clusters, seed)
    return _unit_centres(read(chosen))


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
    """Iterate until no centre moves, or `iterations` are done.

    Args:
        rows: The rows of all processes.
        machine: The processes; this one takes its even share of the rows.
        state: Where to begin.
        iterations: Most iterations in all, those of `state` included.
        dtype: Precision of the product that discards, see `NearestCentres`.
        save: Called on the first process after each iteration.
        reporter: The listener.
    """
    lloyd = _Lloyd(rows, machine, dtype)
    with reporter.progress("k-means", iterations - state.iterations, "iterations") as progress:
        while state.iterations < iterations and not state.converged:
            centres_KD, objective, empty = lloyd.iterate(state.centres_KD)
            converged = torch.equal(centres_KD, state.centres_KD)
            state = LloydState(centres_KD, state.iterations + 1, converged)
            if machine.is_main:
                save(state)
            progress.advance()
            progress.show(similarity=objective, **({"empty": empty} if empty else {}))
    return state


class _Lloyd:
    """This process's share of the rows, with the labels and sums of the last iteration."""

    def __init__(self, rows: ClusterRows, machine: Machine, dtype: torch.dtype) -> None:
        self.rows, self.machine, self.dtype = rows, machine, dtype
        self.start = len(rows) * machine.rank // machine.size
        self.stop = len(rows) * (machine.rank + 1) // machine.size
        self.labels = torch.full((self.stop - self.start,), -1, dtype=torch.int64)
        self.sums: ClusterSums | None = None
        self.kept: dict[int, PreparedRows] = {}
        self.kept_bytes = 0

    def iterate(self, centres_KD: torch.Tensor) -> tuple[torch.Tensor, float, int]:
        """Do one iteration.

        Returns:
            The next centres on the CPU, the mean similarity to the centres that were given, and the number of empty
            clusters; the same on every process.
        """
        device = self.machine.device
        search = NearestCentres(centres_KD.to(device), self.dtype)
        if self.sums is None:
            self.sums = ClusterSums(len(centres_KD), self.rows.width, device)
        for first, last in block_bounds(self.machine, self.start, self.stop):
            block = self._block(first, last)
            labels_B = search.nearest(block)
            mine = slice(first - self.start, last - self.start)
            self.sums.move(block.rows_BD, self.labels[mine].to(device), labels_B)
            self.labels[mine] = labels_B.cpu()
        next_KD, total = self._next_centres(search.centres_KD, self.sums)
        counts_K = self.machine.sum_(self.sums.counts_K.clone())
        empty = (counts_K == 0).nonzero()[:, 0].cpu()
        if len(empty):
            seeds_KD = self._farthest_rows(search, len(empty))
            next_KD[empty[: len(seeds_KD)]] = seeds_KD
        return next_KD, total / len(self.rows), len(empty)

    def _block(self, first: int, last: int) -> PreparedRows:
        """Return a block of rows: kept from the iteration before while there is room, else read and prepared again."""
        block = self.kept.get(first)
        if block is None:
            block = load_rows(self.rows.features(first, last), self.machine, self.dtype)
            if self.kept_bytes + block.num_bytes <= _KEPT_BYTES:
                self.kept[first] = block
                self.kept_bytes += block.num_bytes
        return block

    def _next_centres(self, centres_KD: torch.Tensor, sums: ClusterSums) -> tuple[torch.Tensor, float]:
        """Add up the sums of all processes, some clusters at a time, and turn them into centres."""
        parts, total = [], 0.0
        for first in range(0, len(centres_KD), _SUMS_AT_ONCE):
            old_CD = centres_KD[first : first + _SUMS_AT_ONCE]
            sums_CD = self.machine.sum_(sums.sums_KD[first : first + _SUMS_AT_ONCE].clone())
            total += sum_of_similarities(sums_CD, old_CD)
            parts.append(centres_of_sums(sums_CD, old_CD).cpu())
        return torch.cat(parts), total

    def _farthest_rows(self, search: NearestCentres, count: int) -> torch.Tensor:
        """Find rows to re-seed empty clusters with; the same on every process. Float32 [≤ count, D], unit rows."""
        device = self.machine.device
        similarities = np.empty(self.stop - self.start, dtype=np.float64)
        for first, last in block_bounds(self.machine, self.start, self.stop):
            block_BD = self._block(first, last).rows_BD
            mine = slice(first - self.start, last - self.start)
            own = search.similarities(block_BD, torch.arange(last - first, device=device), self.labels[mine].to(device))
            similarities[mine] = own.cpu().numpy()
        numbers = np.arange(self.start, self.stop, dtype=np.int64)
        local = choose_seeds(similarities, numbers, self._read_row, count)
        gathered = self.machine.gather((similarities[local], numbers[local]))
        all_similarities, all_numbers = (np.concatenate(parts) for parts in zip(*gathered, strict=True))
        chosen = all_numbers[choose_seeds(all_similarities, all_numbers, self._read_row, count)]
        return _unit_centres(torch.from_numpy(self.rows.features_at(chosen)))

    def _read_row(self, number: int) -> npt.NDArray[np.float16]:
        row: npt.NDArray[np.float16] = self.rows.features(number, number + 1)[0]
        return row


def _unit_centres(rows_KD: torch.Tensor) -> torch.Tensor:
    return centres_of_sums(rows_KD.double(), torch.zeros(rows_KD.shape))
