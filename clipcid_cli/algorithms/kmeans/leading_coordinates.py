"""Rows and centroids by their leading coordinates: a shorter product that bounds every similarity from above.

Shape letters: B rows, D width, d leading coordinates.

In an orthonormal basis [V₁ V₂] of which the rows have most of their length along V₁, with P = V₁ᵀx, Q = V₁ᵀc and x₂, c₂ what
is left of x and c,

    x·c = P·Q + x₂·c₂ ≤ P·Q + |x₂|·|c₂| = [P, |x₂|]·[Q, |c₂|]      (Cauchy–Schwarz)

is a product of width d + 1. What it discards is discarded rightly, so the nearest centroid stays exact; embeddings have few
strong directions, and means of rows have less outside them than rows, so little is left to decide. [O]

As computed, V₁ is orthonormal up to E = V₁ᵀV₁ − I, and P̂, Q̂ are P, Q rounded to float32. With x₂ = x − V₁P̂ and c₂ = c − V₁Q̂

    x·c = P̂·Q̂ + P̂ᵀEQ̂ + P̂·V₁ᵀc₂ + Q̂·V₁ᵀx₂ + x₂·c₂,      V₁ᵀc₂ = (Q − Q̂) − EQ̂, and V₁ᵀx₂ likewise,

so the product is too small by at most (3‖E‖ + 2ρ)·|P̂|·|Q̂|, ρ = 2⁻²⁴ the rounding of a copy, beside its own rounding γ.
"""

from __future__ import annotations

import dataclasses

import torch

# Rounding of float64 sums, far above what they are off by.
_SLACK = 1e-13
_ROUNDED_UP = 1 + 2.0**-22


@dataclasses.dataclass(frozen=True)
class LeadingCoordinates:
    """Some orthonormal directions.

    Attributes:
        vectors_Dd: V₁, float64 [D, d].
        defect: At least ‖E‖.
    """

    vectors_Dd: torch.Tensor
    defect: float

    @property
    def width(self) -> int:
        """Width of the product, d + 1."""
        return self.vectors_Dd.shape[1] + 1

    @property
    def relative_error(self) -> float:
        """By how much the product can be too small, as a share of the lengths of the two copies."""
        return self.width * 2.0**-22 + 3 * self.defect + 2.0**-22

    def encode(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """Return [P̂, |x₂|] of rows or centroids, |x₂| rounded up.

        Args:
            rows_BD: Any float format, [B, D].

        Returns:
            float32 [B, d + 1].
        """
        exact_BD = rows_BD.double()
        rotated_Bd = exact_BD @ self.vectors_Dd
        encoded_BW = torch.empty(len(rows_BD), self.width, device=rows_BD.device)
        encoded_BW[:, :-1] = rotated_Bd
        copied_Bd = encoded_BW[:, :-1].double()
        squares_B = exact_BD.square().sum(dim=1) - 2 * (rotated_Bd * copied_Bd).sum(dim=1)
        squares_B += (1 + self.defect) * copied_Bd.square().sum(dim=1)
        encoded_BW[:, -1] = squares_B.clamp_(min=0.0).add_(_SLACK).sqrt_() * _ROUNDED_UP
        return encoded_BW


def principal_directions(rows_BD: torch.Tensor) -> torch.Tensor:
    """Return the directions of some rows, those along which they are longest first; float64 [D, D], columns.

    Args:
        rows_BD: Any float format, [B, D]; their mean is not taken away.
    """
    exact_BD = rows_BD.double()
    directions_DD: torch.Tensor = torch.linalg.eigh(exact_BD.T @ exact_BD).eigenvectors.flip(1)
    return directions_DD


def leading_coordinates(directions_DD: torch.Tensor, number: int) -> LeadingCoordinates:
    """Take the first `number` of some directions, float64 [D, D]."""
    vectors_Dd = directions_DD[:, :number].contiguous()
    identity_dd = torch.eye(number, dtype=torch.float64, device=vectors_Dd.device)
    defect = float(torch.linalg.matrix_norm(vectors_Dd.T @ vectors_Dd - identity_dd))
    return LeadingCoordinates(vectors_Dd, defect + _SLACK)
