"""The nearest of centroids but for rounding, by products of small integers: for the first iterations.

There centroids move far, so that bounds spare few comparisons, and which of two is nearer by a hair does not matter yet. So
float64 decides nothing, and once a row has a centroid it is compared with those around that one only, where that finds most
of the second nearest: √K centroids lead groups, each centroid is in the group of the leader nearest to it, and the row is
compared with the centroids of its own group and of those whose leaders are nearest to its own leader.

**The same everywhere.** A row is rounded to integers times a step of its own, all centroids to integers times one step:
which product is the largest depends on neither step. Integers of at most √(2²⁴/D) make products whose sums are exact in any
order, in int32 and in float32, so what is found depends on neither formats, devices, threads nor processes.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from clipcid_cli.algorithms.near.block import exact_accumulation, multiply, score_dtype
from clipcid_cli.algorithms.near.exact import ROWS_IN_CACHE
from clipcid_cli.algorithms.near.nearest import PRODUCT_ROWS

# Groups that a row is compared with: of 2,048 centroids they are about a quarter. With 8 groups the mean similarity ended
# up to 0.05 % lower, with 16 it ended as high and took longer (60,000 rows).
_NEAR_GROUPS = 12
# Fraction of the rows whose second nearest centroid must be among those: 0.66 of rows in groups and 0.86 of a cloud were; of
# rows without structure 0.26, whose mean similarity ended 5 % lower.
_LEAST_FOUND = 0.6
_BELOW_ALL = -(2**25)


@dataclasses.dataclass(frozen=True)
class CoarseRows:
    """Rows, float16, as integers, in a format whose products are fast and exact, times a step each, float32."""

    stored_BD: torch.Tensor
    integers_BD: torch.Tensor
    step_B: torch.Tensor

    @classmethod
    def of(cls, stored_BD: torch.Tensor, dtype: torch.dtype) -> CoarseRows:
        """Round rows, float16 [B, D]; `dtype` as for `CoarseCentroids`."""
        parts = [part_BD.float() for part_BD in torch.split(stored_BD, ROWS_IN_CACHE)]
        steps = [_step(part_BD.abs().amax(dim=1), part_BD.shape[1]) for part_BD in parts]
        integers = [_round(part_BD, step_B[:, None], dtype) for part_BD, step_B in zip(parts, steps, strict=True)]
        return cls(stored_BD, torch.cat(integers), torch.cat(steps))

    @property
    def num_bytes(self) -> int:
        return self.stored_BD.nbytes + self.integers_BD.nbytes


class CoarseCentroids:
    """Finds nearly the nearest of fixed centroids; several threads may ask at once.

    Args:
        dtype: Format of the exact search, which tells of which products are fast; it changes no answer.
        grouped: Whether a row that has a centroid is compared with those around it only.
    """

    def __init__(self, centroids_KD: torch.Tensor, dtype: torch.dtype, *, grouped: bool) -> None:
        num_centroids, width = centroids_KD.shape
        parts = torch.split(centroids_KD, ROWS_IN_CACHE)
        self._step = _step(torch.stack([part_CD.abs().amax() for part_CD in parts]).amax(), width)
        self._integers_KD = torch.cat([_round(part_CD, self._step, dtype) for part_CD in parts])
        self._near = list[torch.Tensor]()
        if not grouped:
            return
        num_groups = math.isqrt(num_centroids)
        device = centroids_KD.device
        leaders_GD = self._integers_KD[torch.arange(num_groups, device=device) * num_centroids // num_groups]
        self._group_K = _largest(self._integers_KD, leaders_GD)[0]
        members = torch.split(*_by_group(self._group_K, num_groups))
        self._place_K = torch.empty_like(self._group_K)
        for member_C in members:
            self._place_K[member_C] = torch.arange(len(member_C), device=device)
        # The first group near a group is itself.
        score_GG = _multiply(leaders_GD, leaders_GD).fill_diagonal_(-_BELOW_ALL)
        near_GG = torch.sort(score_GG, dim=1, descending=True, stable=True).indices[:, :_NEAR_GROUPS]
        self._near = [torch.cat([members[group] for group in near]) for near in near_GG.tolist()]

    def nearest(self, rows: CoarseRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest of all centroids, the first of equal ones, and about the similarities to them, float64 [B]."""
        number_B, score_B, _ = _largest(rows.integers_BD, self._integers_KD)
        return number_B, score_B * self._units(rows)

    def nearest_other(self, rows: CoarseRows, own_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compare rows with all centroids, or with those around their own.

        Returns:
            The nearest beside the own one, int64 [B], and about the similarities to it and to the own one, float64 [B].
        """
        if not self._near:
            number_B, score_B, own_score_B = _largest(rows.integers_BD, self._integers_KD, own_B)
            return number_B, score_B * self._units(rows), own_score_B * self._units(rows)
        order_B, counts = _by_group(self._group_K[own_B], len(self._near))
        sorted_BD, place_B = rows.integers_BD.index_select(0, order_B), self._place_K[own_B[order_B]]
        found = list[tuple[torch.Tensor, ...]]()
        for number_C, group_BD, own_place_B in zip(
            self._near, torch.split(sorted_BD, counts), torch.split(place_B, counts), strict=True
        ):
            if len(group_BD):
                near_CD = self._integers_KD.index_select(0, number_C)
                largest_B, score_B, own_score_B = _largest(group_BD, near_CD, own_place_B)
                found.append((number_C[largest_B], score_B, own_score_B))
        back_B = torch.argsort(order_B)
        number_B, score_B, own_score_B = (torch.cat(each)[back_B] for each in zip(*found, strict=True))
        return number_B, score_B * self._units(rows), own_score_B * self._units(rows)

    def _units(self, rows: CoarseRows) -> torch.Tensor:
        return rows.step_B.double() * self._step.double()


def are_local(rows: CoarseRows, centroids_KD: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tell whether of most rows the second nearest centroid is around the nearest one."""
    all_, around = (CoarseCentroids(centroids_KD, dtype, grouped=grouped) for grouped in (False, True))
    nearest_B = all_.nearest(rows)[0]
    is_found_B = all_.nearest_other(rows, nearest_B)[0] == around.nearest_other(rows, nearest_B)[0]
    return int(is_found_B.sum()) >= _LEAST_FOUND * len(nearest_B)


def _largest(
    integers_BD: torch.Tensor, integers_KD: torch.Tensor, own_B: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return where products are largest, the first of equal ones, how large, and those at `own_B`, which is left out."""
    size = PRODUCT_ROWS[integers_BD.device.type]
    device = integers_BD.device
    # Fresh memory for each product would take as long as the product.
    room = min(size, len(integers_BD)) * min(size, len(integers_KD))
    buffer = torch.empty(room, dtype=score_dtype(integers_BD.dtype)) if device.type == "cpu" else None
    own_B = torch.full((len(integers_BD),), -1, device=device) if own_B is None else own_B
    found = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]()
    for rows_BD, own_B1 in zip(torch.split(integers_BD, size), torch.split(own_B[:, None], size), strict=True):
        best_B1, own_score_B1 = torch.full_like(own_B1, _BELOW_ALL), torch.full_like(own_B1, _BELOW_ALL)
        number_B1 = torch.zeros_like(own_B1)
        first = 0
        for part_CD in torch.split(integers_KD, size):
            score_BC = _multiply(rows_BD, part_CD, buffer)
            place_B1 = (own_B1 - first).clamp(0, len(part_CD) - 1)
            score_B1, is_own_B1 = score_BC.gather(1, place_B1), place_B1 + first == own_B1
            own_score_B1 = torch.where(is_own_B1, score_B1.long(), own_score_B1)
            score_BC.scatter_(1, place_B1, score_B1.masked_fill(is_own_B1, _BELOW_ALL))
            place_B1 = _first_largest(score_BC)[:, None]
            score_B1 = score_BC.gather(1, place_B1).long()
            number_B1 = torch.where(score_B1 > best_B1, place_B1 + first, number_B1)
            best_B1 = torch.maximum(best_B1, score_B1)
            first = first + len(part_CD)
        found.append((number_B1[:, 0], best_B1[:, 0], own_score_B1[:, 0]))
    number_B, best_B, own_score_B = (torch.cat(each) for each in zip(*found, strict=True))
    return number_B, best_B, own_score_B


def _step(largest: torch.Tensor, width: int) -> torch.Tensor:
    """Return what the integer 1 stands for, float32 > 0, from the largest absolute entries of rows of a width."""
    limit = min(127, math.isqrt(2**24 // width))
    # A GPU multiplies by the reciprocal of a number, but divides by a tensor, rounding once.
    return (largest / torch.full_like(largest, limit)).clamp(min=torch.finfo(torch.float32).tiny)


def _round(values_BD: torch.Tensor, steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if values_BD.device.type == "cuda":
        dtype = torch.float16
    elif dtype != torch.float32 and values_BD.shape[1] > 1:  # PyTorch 2.13 fails at int8 products of one column
        dtype = torch.int8
    else:
        dtype = torch.float32
    return (values_BD / steps).round_().to(dtype)


def _multiply(a_BD: torch.Tensor, b_CD: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Return the products of integers: int32, or whole numbers in float32."""
    if a_BD.dtype != torch.float16:
        return multiply(a_BD, b_CD, buffer)
    with exact_accumulation(a_BD.device):
        return torch.mm(a_BD, b_CD.T, out_dtype=torch.float32)


def _by_group(group_B: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, list[int]]:
    """Return positions in the order of their groups, int64 [B], and how many each group has."""
    return torch.argsort(group_B, stable=True), torch.bincount(group_B, minlength=num_groups).tolist()


def _first_largest(score_BC: torch.Tensor) -> torch.Tensor:
    """Return where each row is largest, the first place of equal ones: NumPy's takes an eighth of the time of PyTorch's."""
    if score_BC.device.type == "cpu":
        return torch.from_numpy(score_BC.numpy().argmax(axis=1))
    return score_BC.argmax(dim=1)
