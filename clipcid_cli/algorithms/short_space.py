"""Rows and centres in the few directions along which rows are longest: where k-means starts, at a fraction of the cost.

Shape letters: B rows of a block, K centres, D width, d directions.

The first iterations of k-means move centres far, so none of their comparisons can be spared by bounds, and which centre is
nearest by a hair does not matter yet. Embeddings have most of their length along few directions, so the first iterations
compare rows and centres there; what they find is where the iterations in full begin. [O] In the manner of Ding and He 2004,
who show that the principal directions span the clusters' means.

**The same bits everywhere.** Directions are rounded to multiples of 2⁻¹⁶, the entries of rows and centres are multiples of
2⁻²⁴ (:mod:`clipcid_cli.algorithms.nearest_centres`), so their products are multiples of 2⁻⁴⁰ and float64 holds every sum of
them exactly, in any order. Short rows are those sums rounded to float16, short centres normalised and rounded to the grid as
centres in full are; so nearest short centres are found exactly, by the same search.
"""

from __future__ import annotations

import dataclasses

import torch

from clipcid_cli.algorithms.kmeans import centres_of_sums
from clipcid_cli.algorithms.leading_coordinates import principal_directions

_GRID = 2.0**16
# Products of float64 stay near the caches.
_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class ShortSpace:
    """Some directions.

    Attributes:
        vectors_Dd: Orthonormal but for their rounding, float64 [D, d], multiples of 2⁻¹⁶.
        share: Share of the rows' squared length that lies along them, in [0, 1].
    """

    vectors_Dd: torch.Tensor
    share: float

    @classmethod
    def of(cls, rows_BD: torch.Tensor, number: int) -> ShortSpace:
        """Find the directions of some rows.

        Args:
            rows_BD: Rows from all over the data, float16 [B, D].
            number: How many directions, d ≤ D.

        Returns:
            The same to the bit for the same rows and number of threads.
        """
        vectors_Dd = (principal_directions(rows_BD)[:, :number] * _GRID).round() / _GRID
        exact_BD = rows_BD.double()
        share = float((exact_BD @ vectors_Dd).square().sum() / exact_BD.square().sum())
        return cls(vectors_Dd.contiguous(), share)

    def to(self, device: torch.device) -> ShortSpace:
        """Return it on a device."""
        return ShortSpace(self.vectors_Dd.to(device), self.share)

    def rows(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Return rows in these directions: float16 [B, d] of float16 [B, D], no longer than rows in full."""
        parts = torch.split(rows_BD, _AT_ONCE)
        return torch.cat([(part_BD.double() @ self.vectors_Dd).float().half() for part_BD in parts])

    def centres(self, centres_KD: torch.Tensor) -> torch.Tensor:
        """Return centres in these directions: unit rows, float32 [K, d] on the grid, of float32 [K, D] on the grid.

        Unit rows, since a row must be nearest to a centre of its own direction; 0 where a centre has no length here.
        """
        short_Kd = centres_KD.new_empty(len(centres_KD), self.vectors_Dd.shape[1])
        for first in range(0, len(centres_KD), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            exact_Cd = centres_KD[part].double() @ self.vectors_Dd
            short_Kd[part] = centres_of_sums(exact_Cd, torch.zeros_like(short_Kd[part]))
        return short_Kd
