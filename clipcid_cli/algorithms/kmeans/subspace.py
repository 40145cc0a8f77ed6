"""The first iterations of k-means in a subspace that holds most of the rows' length, at a fraction of the cost.

They move centroids far, so bounds spare few of their comparisons, and which centroid is nearest by a hair does not matter
yet. Embeddings have most of their length along few directions, so rows and centroids are compared there; the iterations in
full begin with what was found. In the manner of Ding and He 2004, who show that the principal directions span the
clusters' means.

Shape letters: B rows of a block, K centroids, D width, d directions.

**The same bits everywhere.** Every product here is of numbers on grids so coarse that float64 holds all sums of them
exactly, in any order; the rest is element-wise arithmetic in a fixed order, which IEEE 754 fixes to the bit.

- The sampled rows are rounded to multiples of 2⁻²⁰: entries of their Gram matrix are multiples of 2⁻⁴⁰ and at most their
  number, 4,096, as are all partial sums (Cauchy–Schwarz).
- The Gram matrix, scaled by a power of 2 to a trace of at most 1.01, is rounded to multiples of 2⁻²⁶ and multiplied again
  and again with orthonormal columns rounded to multiples of 2⁻²⁵ (randomised subspace iteration: Halko, Martinsson and
  Tropp 2011): sums are multiples of 2⁻⁵¹ below 2.
- Directions are rounded to multiples of 2⁻¹⁶, the entries of rows and centroids are multiples of 2⁻²⁴
  (:mod:`clipcid_cli.algorithms.kmeans.nearest`): sums are multiples of 2⁻⁴⁰ below 2. Projected rows are those sums rounded
  to float32 and then to float16, projected centroids are normalised and rounded to the grid as centroids in full are; so
  the nearest are found exactly, by the same search. Rows of length ≤ 1.002 stay below 1.01: rounding the
  directions stretches by at most 1 + √(dD)·2⁻¹⁷, 1.004 for 64 of 4,096.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from clipcid_cli.algorithms.kmeans.kmeans import RowReader
from clipcid_cli.algorithms.search.centroids import centroids_of_sums, fold_sum

# Directions; how many of the iterations compare there (at most three, at most one in four); and where it pays: the share of
# squared length along the directions, of all rows and of nine rows in ten, and the number of centroids. On 100,000 rows and
# 4,096 centroids, 3 of 20 iterations in 64 of 512 directions saved a fifth to a third of the time and ended 0.2 to 1.3 %
# better where the directions held 45 to 92 %, and 4.6 % worse where they held 20 %. Rows outside the directions are served
# badly: with 20 to 40 % of such rows it ended 0.5 to 1.1 % worse.
SUBSPACE_WIDTH = 64
_MOST_ITERATIONS = 3
_ONE_ITERATION_IN = 4
_LEAST_SHARE = 0.4
_LEAST_LOW_SHARE = 0.25
_FEWEST_CENTROIDS = 1024

# More sampled rows would not fit the exact sums.
_MOST_ROWS = 4096
_ROW_GRID, _GRAM_GRID, _COLUMN_GRID, _GRID = 2.0**20, 2.0**26, 2.0**25, 2.0**16
# Multiplications with the Gram matrix: on three kinds of rows the directions then held 0.1 to 0.6 points less than the exact
# principal ones, on rows without structure 1.7.
_POWERS = 4
# A column of which less than this is left without the columns before it counts as their rounding.
_ROUNDING = 2.0**-36
# Products of float64 stay near the caches.
_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Subspace:
    """The span of some directions.

    Attributes:
        vectors_Dd: Orthonormal but for their rounding, float64 [D, d], multiples of 2⁻¹⁶.
        share: Share of the sampled rows' squared length that lies along them.
        low_share: What nine of ten sampled rows have at least.
    """

    vectors_Dd: torch.Tensor
    share: float
    low_share: float

    @classmethod
    def of(cls, rows_BD: torch.Tensor, number: int) -> Subspace:
        """Find directions of some rows.

        Args:
            rows_BD: Rows from all over the data, float16 [B, D] on the CPU, B ≤ 4,096.
            number: How many directions, d ≤ D.

        Returns:
            A function of the rows and the number, to the bit.

        Raises:
            ValueError: when there are more rows.
        """
        if len(rows_BD) > _MOST_ROWS:
            raise ValueError(f"directions are found from at most {_MOST_ROWS} rows, not {len(rows_BD)}")
        exact_BD = rows_BD.double()
        sampled_BD = (exact_BD * _ROW_GRID).round() / _ROW_GRID
        gram_DD = sampled_BD.T @ sampled_BD / 2.0 ** math.ceil(math.log2(len(rows_BD)))
        gram_DD = (gram_DD * _GRAM_GRID).round() / _GRAM_GRID
        columns_Dd = _first_columns(rows_BD.shape[1], number)
        for _ in range(_POWERS):
            columns_Dd = _orthonormal((gram_DD @ columns_Dd).T).T
        vectors_Dd = ((columns_Dd * _GRID).round() / _GRID).contiguous()
        inside_B, all_B = fold_sum((exact_BD @ vectors_Dd).square()), fold_sum(exact_BD.square())
        shares_B = (inside_B / all_B.clamp(min=torch.finfo(torch.float64).tiny)).sort().values
        share = fold_sum(inside_B[None])[0] / fold_sum(all_B[None])[0]
        return cls(vectors_Dd, float(share), float(shares_B[len(shares_B) // 10]))

    def to(self, device: torch.device) -> Subspace:
        """Return it on a device."""
        return dataclasses.replace(self, vectors_Dd=self.vectors_Dd.to(device))

    def project_rows(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Project rows onto these directions: float16 [B, d] of float16 [B, D]."""
        parts = torch.split(rows_BD, _AT_ONCE)
        return torch.cat([(part_BD.double() @ self.vectors_Dd).float().half() for part_BD in parts])

    def project_centroids(self, centroids_KD: torch.Tensor) -> torch.Tensor:
        """Project centroids onto these directions: unit rows, float32 [K, d] on the grid, of float32 [K, D] on the grid.

        Unit rows, since a row must be nearest to a centroid of its own direction; 0 where it has no length along them.
        """
        projected_Kd = centroids_KD.new_empty(len(centroids_KD), self.vectors_Dd.shape[1])
        for first in range(0, len(centroids_KD), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            exact_Cd = centroids_KD[part].double() @ self.vectors_Dd
            projected_Kd[part] = centroids_of_sums(exact_Cd, torch.zeros_like(projected_Kd[part]))
        return projected_Kd


def subspace_iterations(iterations: int) -> int:
    """Return how many of the iterations, the first, compare in a subspace where there is one."""
    return min(_MOST_ITERATIONS, iterations // _ONE_ITERATION_IN)


def find_subspace(rows: RowReader, num_clusters: int) -> Subspace | None:
    """Find the subspace in which the first iterations compare; None where they would not gain from it.

    A function of the rows and K.
    """
    if num_clusters < _FEWEST_CENTROIDS or rows.width < 4 * SUBSPACE_WIDTH:
        return None
    places = np.linspace(0, len(rows) - 1, min(len(rows), _MOST_ROWS), dtype=np.int64)
    subspace = Subspace.of(torch.from_numpy(rows.features_at(places)), SUBSPACE_WIDTH)
    return subspace if subspace.share >= _LEAST_SHARE and subspace.low_share >= _LEAST_LOW_SHARE else None


def _first_columns(width: int, number: int) -> torch.Tensor:
    """Return random columns on the grid, of length at most 1: float64 [D, d]."""
    signs = np.random.default_rng(0).integers(0, 2, size=(width, number)) * 2.0 - 1.0
    return torch.from_numpy(signs) * 2.0 ** -math.ceil(math.log2(width) / 2)


def _orthonormal(rows_dD: torch.Tensor) -> torch.Tensor:
    """Return unit rows on the column grid that span what some rows do, float64 [d, D]: Gram–Schmidt, each row twice.

    Rows of which only rounding is left without those before them become 0.
    """
    result_dD = torch.zeros_like(rows_dD)
    for number, row_D in enumerate(rows_dD):
        before_nD = result_dD[:number]
        least = _ROUNDING * _length(row_D)
        for _ in range(2):
            if number:
                along_n = fold_sum(before_nD * row_D)
                row_D = row_D - fold_sum((before_nD * along_n[:, None]).T.contiguous())
        length = _length(row_D)
        if length > least:
            result_dD[number] = row_D / length
    return (result_dD * _COLUMN_GRID).round() / _COLUMN_GRID


def _length(row_D: torch.Tensor) -> float:
    return math.sqrt(float(fold_sum(row_D.square()[None])[0]))
