"""The nearest centroids of some rows found so far, and how near the centroids that were discarded may be.

Shape letters: B rows of a block, P (row, centroid) pairs.
"""

from __future__ import annotations

import dataclasses

import torch

# No centroid yet: above every number, so that any centroid wins a tie against it.
_NONE = torch.iinfo(torch.int64).max


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The nearest centroids of some rows.

    Attributes:
        centroids_B: Numbers of the centroids, int64 [B].
        similarities_B: Exact similarities to them, float64 [B].
        others_B: No other centroid that was looked at is more similar than this, float64 [B].
    """

    centroids_B: torch.Tensor
    similarities_B: torch.Tensor
    others_B: torch.Tensor

    def chosen(self, which: torch.Tensor | slice) -> Nearest:
        """Return some of the rows, by positions int64 [n] or a slice."""
        return Nearest(self.centroids_B[which], self.similarities_B[which], self.others_B[which])


class BestSoFar:
    """The nearest of the centroids decided so far; its attributes are those of `Nearest`."""

    def __init__(self, known: Nearest | None, num_rows: int, device: torch.device) -> None:
        def fill(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=device)

        self.centroids_B = fill(_NONE, torch.int64) if known is None else known.centroids_B
        self.similarities_B = fill(-torch.inf, torch.float64) if known is None else known.similarities_B
        self.others_B = fill(-torch.inf, torch.float64)

    def take(self, row_P: torch.Tensor, centroid_P: torch.Tensor, similarity_P: torch.Tensor) -> None:
        """Take pairs into account; those that were before, and those with a row's centroid so far, change nothing."""
        best_B = self.similarities_B.scatter_reduce(0, row_P, similarity_P, "amax")
        # Masked, not selected: a GPU would make the host wait for the size of a selection.
        winner_P = torch.where(similarity_P == best_B[row_P], centroid_P, _NONE)
        centroids_B = torch.where(self.similarities_B == best_B, self.centroids_B, _NONE)
        centroids_B.scatter_reduce_(0, row_P, winner_P, "amin")
        self.bound_others(row_P, similarity_P.masked_fill(centroid_P == centroids_B[row_P], -torch.inf))
        replaced_B = torch.where(centroids_B == self.centroids_B, -torch.inf, self.similarities_B)
        self.others_B = torch.maximum(self.others_B, replaced_B)
        self.centroids_B, self.similarities_B = centroids_B, best_B

    def bound_others(self, row_P: torch.Tensor, similarity_P: torch.Tensor) -> None:
        """Take into account how similar centroids that are not their row's nearest may be."""
        self.others_B = self.others_B.scatter_reduce(0, row_P, similarity_P, "amax")
