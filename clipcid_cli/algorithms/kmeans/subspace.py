"""Few directions that hold most of the rows' length: the first iterations of k-means compare there, at little cost.

They move centroids far, so bounds spare few of their comparisons, and which centroid is nearest by a hair does not matter
yet. Embeddings have most of their length along few directions, so rows and centroids are compared there
(:mod:`clipcid_cli.algorithms.kmeans.start`); the iterations in full begin with what was found. In the manner of Ding and He
2004, who show that the principal directions span the clusters' means.

Shape letters: B rows of a block, D width, d directions.

**The same bits everywhere.** Every product here is of numbers on grids so coarse that all sums of them are exact, in any
order; the rest is element-wise arithmetic in a fixed order, which IEEE 754 fixes to the bit.

- The sampled rows are rounded to multiples of 2⁻²⁰: entries of their Gram matrix are multiples of 2⁻⁴⁰ and at most their
  number, 4,096, as are all partial sums (Cauchy–Schwarz).
- The Gram matrix, scaled by a power of 2 to a trace of at most 1.01, is rounded to multiples of 2⁻²⁶ and multiplied again
  and again with orthonormal columns rounded to multiples of 2⁻²⁵ (randomised subspace iteration: Halko, Martinsson and
  Tropp 2011): sums are multiples of 2⁻⁵¹ below 2. So are those of the columns' products with each other, and of their
  products with an orthogonal matrix of entries ±1/8.
- To project, rows are rounded to multiples of 2⁻¹² and directions are multiples of 2⁻¹¹: sums are multiples of 2⁻²³ below 2
  while rows are no longer than 1.01 and no wider than 2¹⁶, which float32 holds exactly.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.kmeans.kmeans import RowReader
from clipcid_cli.algorithms.near.block import exact_accumulation
from clipcid_cli.algorithms.near.centroids import fold_sum

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
_SAMPLE_GRID, _GRAM_GRID, _COLUMN_GRID, _ROW_GRID, _GRID = 2.0**20, 2.0**26, 2.0**25, 2.0**12, 2.0**11
# Multiplications with the Gram matrix: on three kinds of rows the directions then held 0.1 to 0.6 points less than the exact
# principal ones, on rows without structure 1.7.
_POWERS = 4
# A column of which less than this is left without the columns before it counts as their rounding.
_ROUNDING = 2.0**-18
# Rows projected at once stay near the caches.
_AT_ONCE = 1024

Columns = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Subspace:
    """The span of some directions.

    Attributes:
        vectors_Dd: Orthonormal but for their rounding, float32 [D, d], multiples of 2⁻¹¹. They are mixed, so that no
            direction has much larger entries than another.
        share: Share of the sampled rows' squared length that lies along them.
        low_share: What nine of ten sampled rows have at least.
    """

    vectors_Dd: torch.Tensor
    share: float
    low_share: float

    @classmethod
    def of(cls, rows_BD: torch.Tensor) -> Subspace:
        """Find directions of some rows.

        Args:
            rows_BD: Rows from all over the data, float16 [B, D] on the CPU, B ≤ 4,096, D ≥ 64.

        Returns:
            A function of the rows, to the bit.

        Raises:
            ValueError: when there are more rows.
        """
        if len(rows_BD) > _MOST_ROWS:
            raise ValueError(f"directions are found from at most {_MOST_ROWS} rows, not {len(rows_BD)}")
        sampled_BD = rows_BD.float().mul_(_SAMPLE_GRID).round_().div_(_SAMPLE_GRID).double()
        gram_DD = sampled_BD.T @ sampled_BD / 2.0 ** math.ceil(math.log2(len(rows_BD)))
        gram_DD = (gram_DD * _GRAM_GRID).round() / _GRAM_GRID
        columns_dD = _first_columns(rows_BD.shape[1])
        for _ in range(_POWERS):
            columns_dD = _orthonormal((gram_DD @ torch.from_numpy(columns_dD).T).T.numpy())
        mixed_dD = _mixing() @ columns_dD
        vectors_Dd = torch.from_numpy((mixed_dD.T * _GRID).round() / _GRID).float().contiguous()
        subspace = cls(vectors_Dd, 0.0, 0.0)
        inside_B = fold_sum(subspace.project(rows_BD).double().square())
        all_B = fold_sum(sampled_BD.square())
        shares_B = (inside_B / all_B.clamp(min=torch.finfo(torch.float64).tiny)).sort().values
        share = float(fold_sum(inside_B[None])[0] / fold_sum(all_B[None])[0])
        return dataclasses.replace(subspace, share=share, low_share=float(shares_B[len(shares_B) // 10]))

    def to(self, device: torch.device) -> Subspace:
        """Return it on a device."""
        return dataclasses.replace(self, vectors_Dd=self.vectors_Dd.to(device))

    def project(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Project unit rows, float16 or float32 [B, D], onto these directions: float32 [B, d], multiples of 2⁻²³."""
        with exact_accumulation(rows_BD.device):
            parts = [
                part_BD.float().mul(_ROW_GRID).round_().div_(_ROW_GRID) @ self.vectors_Dd
                for part_BD in torch.split(rows_BD, _AT_ONCE)
            ]
        return torch.cat(parts)


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
    subspace = Subspace.of(torch.from_numpy(rows.features_at(places)))
    return subspace if subspace.share >= _LEAST_SHARE and subspace.low_share >= _LEAST_LOW_SHARE else None


def _first_columns(width: int) -> Columns:
    """Return random columns on the grid, of length at most 1: float64 [d, D]."""
    signs = np.random.default_rng(0).integers(0, 2, size=(width, SUBSPACE_WIDTH)).T * 2.0 - 1.0
    return (signs * 2.0 ** -math.ceil(math.log2(width) / 2)).astype(np.float64)


def _mixing() -> Columns:
    """Return the orthogonal matrix of entries ±1/8, float64 [64, 64]: Sylvester's of Hadamard, its columns' signs random."""
    matrix = np.ones((1, 1))
    while len(matrix) < SUBSPACE_WIDTH:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.random.default_rng(1).integers(0, 2, size=SUBSPACE_WIDTH) * 2.0 - 1.0
    return (matrix * signs / 8.0).astype(np.float64)


def _orthonormal(rows_dD: Columns) -> Columns:
    """Return unit rows on the column grid that span what some rows do, float64 [d, D]: Gram–Schmidt, each row twice.

    Rows of which only rounding is left without those before them become 0.
    """
    result_dD = np.zeros_like(rows_dD)
    for number, row_D in enumerate(rows_dD):
        row_D, length = _unit(row_D)
        for _ in range(2):
            if number and length:
                along_n = _on_grid(result_dD[:number] @ row_D)
                row_D, length = _unit(row_D - along_n @ result_dD[:number])
        result_dD[number] = row_D
    return result_dD


def _unit(row_D: Columns) -> tuple[Columns, float]:
    """Return a row at length 1 on the column grid and its length before; 0 where it is as short as rounding is."""
    length = math.sqrt(math.fsum((row_D * row_D).tolist()))  # the exact sum, rounded once
    return (_on_grid(row_D / length), length) if length > _ROUNDING else (np.zeros_like(row_D), 0.0)


def _on_grid(values: Columns) -> Columns:
    return (values * _COLUMN_GRID).round() / _COLUMN_GRID
