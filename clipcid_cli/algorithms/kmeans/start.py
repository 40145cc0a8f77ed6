"""The first iterations of k-means, which compare rows and centroids along few directions, by products of small integers.

Rows and centroids are projected (:mod:`clipcid_cli.algorithms.kmeans.subspace`) and rounded to integers of at most 127,
rows each with a step of its own and centroids with one step for all: which product is the largest depends on neither.
Products of such integers are exact in any order, in int32 and, up to 1,000 directions, in float32: all sums of them stay
below 2²⁴. So are the sums of rows, integers times the row's step, in float64. Hence the nearest centroids, equal ones by the
smaller number, and the centroids that follow are the same for any format, device, number of threads or processes.

Only projections are summed here: the mean of projected rows is the projection of their mean. The last of these iterations
is :meth:`clipcid_cli.algorithms.kmeans.lloyd.Lloyd.iterate_along`'s, which sums the rows in full.

Shape letters: B rows of a run, K centroids, C centroids of a chunk, D width, d directions.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable

import torch

from clipcid_cli.algorithms.kmeans.kept_runs import KeptRuns, Room
from clipcid_cli.algorithms.kmeans.subspace import Subspace
from clipcid_cli.algorithms.near.block import exact_accumulation
from clipcid_cli.algorithms.near.centroids import ClusterSums, centroids_of_sums

_LARGEST = 127
_BELOW_ALL = -(2**24)  # less than any product of codes
# Steps are integers times this, as projections are.
_UNIT = 2.0**-23
# Rows multiplied at once, and centroids: the products stay near the caches of a CPU.
_ROWS_AT_ONCE = {"cpu": 1024, "cuda": 16_384}
_CHUNK = {"cpu": 4096, "cuda": 16_384}


@dataclasses.dataclass(frozen=True)
class CodedRows:
    """Projected rows as small integers.

    Attributes:
        codes_Bd: int8 [B, d].
        steps_B: What the integer 1 stands for, a multiple of 2⁻²³, float32 [B].
    """

    codes_Bd: torch.Tensor
    steps_B: torch.Tensor

    @classmethod
    def of(cls, projected_Bd: torch.Tensor) -> CodedRows:
        """Round projections, float32 [B, d], multiples of 2⁻²³."""
        largest_B = projected_Bd.abs().amax(dim=1)
        steps_B = _divide(largest_B, _LARGEST * _UNIT).ceil().clamp(min=1.0) * _UNIT
        return cls((projected_Bd / steps_B[:, None]).round().to(torch.int8), steps_B)

    def values(self) -> torch.Tensor:
        """Return what they stand for, float64 [B, d], exact."""
        return self.codes_Bd.double() * self.steps_B.double()[:, None]

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.codes_Bd.nbytes + self.steps_B.nbytes


def code_centroids(centroids_Kd: torch.Tensor) -> torch.Tensor:
    """Round projected centroids, float32 [K, d], to integers of at most 127 times one step: int8 [K, d]."""
    step = _divide(centroids_Kd.abs().max(), _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (centroids_Kd / step).round().to(torch.int8)


def _divide(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """Divide by a number, rounded once: a GPU multiplies by the reciprocal of a number, but divides by a tensor."""
    return values / torch.full_like(values, divisor)


def nearest_codes(codes_Bd: torch.Tensor, centroids_Kd: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the centroid of the largest product with each row, the first of equal ones, int64 [B].

    Args:
        codes_Bd: int8 [B, d], and so are the centroids.
        dtype: float32 multiplies in float32, which is faster on CPUs without int8 dot products; on a GPU every format does.
    """
    device = codes_Bd.device
    wide = dtype == torch.float32 or device.type == "cuda"
    if wide:
        codes_Bd, centroids_Kd = codes_Bd.float(), centroids_Kd.float()
    multiply = torch.mm if wide else torch._int_mm
    chunk = min(_CHUNK[device.type], len(centroids_Kd))
    memory = torch.empty(
        len(codes_Bd) * chunk, dtype=torch.float32 if wide else torch.int32, device=device
    )  # fresh memory for each chunk would cost more than its product
    best_B = torch.full((len(codes_Bd),), _BELOW_ALL, dtype=memory.dtype, device=device)
    nearest_B = torch.zeros(len(codes_Bd), dtype=torch.int64, device=device)
    for first in range(0, len(centroids_Kd), chunk):
        centroids_Cd = centroids_Kd[first : first + chunk]
        product_BC = memory[: len(codes_Bd) * len(centroids_Cd)].view(len(codes_Bd), -1)
        with exact_accumulation(device, small_integers=True):
            multiply(codes_Bd, centroids_Cd.T, out=product_BC)
        place_B = _first_largest(product_BC)
        largest_B = product_BC.gather(1, place_B[:, None])[:, 0]
        nearest_B = torch.where(largest_B > best_B, place_B + first, nearest_B)
        best_B = torch.maximum(largest_B, best_B)
    return nearest_B


def _first_largest(values_BC: torch.Tensor) -> torch.Tensor:
    """Return where each row is largest, the first place of equal ones: NumPy's takes an eighth of the time of PyTorch's."""
    if values_BC.device.type == "cpu":
        return torch.from_numpy(values_BC.numpy().argmax(axis=1))
    return values_BC.argmax(dim=1)


class SubspaceIterations:
    """Iterations along few directions over a process's share of the rows.

    Args:
        read: Reads a run of rows by the number of its first, float16 [B, D] on the device to compute on.
        runs: Numbers of the first rows of all runs.
        centroids_KD: Where to begin, float32 [K, D] on that device.
        dtype: As for :func:`nearest_codes`.
        room: For coded rows that this process keeps from iteration to iteration; others are read and coded anew.
        sum_over_processes: Returns the sum of a tensor over all processes; may change its argument.
        map_runs: As the built-in; may compute several runs of rows at once, a thread each.
    """

    def __init__(
        self,
        read: Callable[[int], torch.Tensor],
        runs: Iterable[int],
        centroids_KD: torch.Tensor,
        subspace: Subspace,
        *,
        dtype: torch.dtype,
        room: Room,
        sum_over_processes: Callable[[torch.Tensor], torch.Tensor],
        map_runs: Callable[[Callable[[int], None], Iterable[int]], Iterable[None]],
    ) -> None:
        self._runs, self._dtype, self._sum, self._map_runs = runs, dtype, sum_over_processes, map_runs
        # Unit rows: a row must be nearest to a centroid of its own direction.
        projected_Kd = subspace.project(centroids_KD)
        self._move_to(centroids_of_sums(projected_Kd.double(), torch.zeros_like(projected_Kd)))
        self._coded = KeptRuns(lambda first: CodedRows.of(subspace.project(read(first))), room)
        self._changing = threading.Lock()  # of sums, which runs share

    def iterate(self) -> None:
        """Do one iteration; a cluster without rows keeps its centroid."""
        num_clusters, width = self._centroids_Kd.shape
        sums = ClusterSums(num_clusters, width, self._centroids_Kd.device)

        def assign(first: int) -> None:
            coded = self._coded.get(first)
            labels_B, values_Bd = self._nearest(coded), coded.values()
            with self._changing:
                sums.move(values_Bd, None, labels_B)

        for _ in self._map_runs(assign, self._runs):
            pass
        self._move_to(centroids_of_sums(self._sum(sums.sums_KD), self._centroids_Kd))

    def last_labels(self, first: int) -> torch.Tensor:
        """Return the nearest centroids of a run of rows, int64 [B], and keep the run no longer."""
        return self._nearest(self._coded.get_last(first))

    def _move_to(self, centroids_Kd: torch.Tensor) -> None:
        self._centroids_Kd, self._codes_Kd = centroids_Kd, code_centroids(centroids_Kd)

    def _nearest(self, coded: CodedRows) -> torch.Tensor:
        parts = torch.split(coded.codes_Bd, _ROWS_AT_ONCE[coded.codes_Bd.device.type])
        return torch.cat([nearest_codes(part_Bd, self._codes_Kd, self._dtype) for part_Bd in parts])
