"""What a search for nearest centres has found so far of some rows, and how near the centres it left out may be.

Shape letters: B rows of a block, P (row, centre) pairs.
"""

from __future__ import annotations

import dataclasses

import torch

# Stands for no centre yet: above every number, so that any centre wins a tie against it.
_NONE = torch.iinfo(torch.int64).max


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The nearest centres of some rows.

    Attributes:
        centres_B: Numbers of the centres, int64 [B].
        similarities_B: Exact similarities to them, float64 [B].
        others_B: No other centre that was looked at is more similar than this, float64 [B].
    """

    centres_B: torch.Tensor
    similarities_B: torch.Tensor
    others_B: torch.Tensor

    def chosen(self, which: torch.Tensor | slice) -> Nearest:
        """Return some of the rows, by positions int64 [n] or a slice."""
        return Nearest(self.centres_B[which], self.similarities_B[which], self.others_B[which])


class Found:
    """The nearest of the centres that were decided so far; its attributes are those of `Nearest`."""

    def __init__(self, known: Nearest | None, num_rows: int, device: torch.device) -> None:
        def fill(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=device)

        self.centres_B = fill(_NONE, torch.int64) if known is None else known.centres_B
        self.similarities_B = fill(-torch.inf, torch.float64) if known is None else known.similarities_B
        self.others_B = fill(-torch.inf, torch.float64)

    def take(self, row_P: torch.Tensor, centre_P: torch.Tensor, similarity_P: torch.Tensor) -> None:
        """Take pairs into account, none twice and none of a row with its centre so far."""
        best_B = self.similarities_B.scatter_reduce(0, row_P, similarity_P, "amax")
        wins_P = similarity_P == best_B[row_P]
        stays_B = self.similarities_B == best_B
        centres_B = torch.where(stays_B, self.centres_B, _NONE)
        centres_B.scatter_reduce_(0, row_P[wins_P], centre_P[wins_P], "amin")
        loses_P = centre_P != centres_B[row_P]
        self.bound_others(row_P[loses_P], similarity_P[loses_P])
        left_B = torch.where(centres_B == self.centres_B, -torch.inf, self.similarities_B)
        self.others_B = torch.maximum(self.others_B, left_B)
        self.centres_B, self.similarities_B = centres_B, best_B

    def bound_others(self, row_P: torch.Tensor, similarity_P: torch.Tensor) -> None:
        """Take into account how similar centres that are not their row's nearest may be."""
        self.others_B = self.others_B.scatter_reduce(0, row_P, similarity_P, "amax")
