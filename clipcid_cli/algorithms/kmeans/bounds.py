"""Which centroids a row must be compared with again after all centroids have moved a little.

Shape letters: B rows, K centroids.

Of each row x are known its nearest centroid a, the exact similarity s = x·c_a, and a bound u with x·c_j ≤ u for all j ≠ a;
as a is nearest, u ≤ s may be taken. The centroids move to c', by δ_j = |c'_j − c_j|, and s' = x·c'_a is computed exactly. By
Cauchy–Schwarz x·c'_j ≤ u + |x|·δ_j, so

- when s' > u: centroids with |x|·δ_j < s' − u stay behind a. The row is compared with those of at least a part θ of
  that gap; the others keep the bound u + |x|·δ with δ their largest movement. A smaller θ compares more now and keeps u
  lower, which saves comparisons later.
- when s' ≤ u and s' ≥ s, which is s' = u = s: centroids that did not move stay behind a, and in ties too, since they lost
  to a before by the same rule. The row is compared with those that moved.
- else (s' ≤ u and s' < s): with all.

In the order of their movement, farthest first, the centroids to compare with are always the leading ones, so rows that need
about equally many share one matrix product. What is found is exact; bounds only decide what is looked at. In the manner
of Hamerly 2010 and of Ding et al. 2015 (Yinyang k-means), with one bound a row: small clusters that move far cost only
themselves.
"""

from __future__ import annotations

import dataclasses

import torch

from clipcid_cli.algorithms.near.centroids import fold_sum
from clipcid_cli.algorithms.near.exact import root

# Rows are unit ones rounded to float16.
_LONGEST_ROW = 1.01
_SHARE_OF_GAP = 0.5
# Covers the rounding of the movements.
_ROUNDED_UP = 1 + 1e-9


@dataclasses.dataclass(frozen=True)
class CentroidDrift:
    """How the centroids moved.

    Attributes:
        order_K: Numbers of the centroids, those that moved farthest first, int64 [K].
        moved_K: Which centroids moved at all, bool [K], by number.
        reach_K: How much more similar a row can be to any centroid after the first n of the order than it was to any other
            than its nearest, by n from 0 to K: float64 [K + 1]; −∞ after all K.
    """

    order_K: torch.Tensor
    moved_K: torch.Tensor
    reach_K: torch.Tensor

    @classmethod
    def of(cls, distances_K: torch.Tensor) -> CentroidDrift:
        """Order the centroids.

        Args:
            distances_K: |c'_j − c_j|, float64 [K].
        """
        reach_K, order_K = torch.sort(distances_K * (_LONGEST_ROW * _ROUNDED_UP), descending=True, stable=True)
        return cls(order_K, distances_K > 0, torch.cat([reach_K, torch.full_like(reach_K[:1], -torch.inf)]))

    def leading(self, before_B: torch.Tensor, now_B: torch.Tensor, others_B: torch.Tensor) -> torch.Tensor:
        """Tell how many of the centroids, in their order, rows must be compared with.

        Args:
            before_B: Similarity s to the nearest centroid before, float64 [B].
            now_B: Similarity s' to that centroid now, float64 [B].
            others_B: Bound u ≤ s of the similarity to any other centroid before, float64 [B].

        Returns:
            Numbers of centroids, int64 [B] in [0, K]. Those after them are less similar than the nearest; those after n, any
            number, are at most u plus ``reach_K[n]``.
        """
        gap_B = now_B - others_B
        count_B = torch.searchsorted(-self.reach_K[:-1], -_SHARE_OF_GAP * gap_B, right=True)
        return torch.where(gap_B > 0, count_B, torch.where(now_B >= before_B, self.moved_K.sum(), len(self.order_K)))


def distances_moved(before_KD: torch.Tensor, after_KD: torch.Tensor) -> torch.Tensor:
    """Return how far centroids moved, from float32 [K, D] each: float64 [K], 0 for those that did not and for no others."""
    return root(fold_sum((after_KD.double() - before_KD.double()).square()))
