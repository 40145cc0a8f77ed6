"""How well a teacher knows the data, as outputs record it and people read it."""

from __future__ import annotations

import msgspec


class PairingFigures(msgspec.Struct):
    """How well a teacher's captions find their own images among those of other captions, beside a guess."""

    pairs: int
    candidates: int  # images that a caption ranks, in the mean
    median_rank: float
    chance_rank: float
    recall_at_1: float
    chance_at_1: float
    recall_at_10: float
    chance_at_10: float
    near_chance: bool
    repaired: bool = False  # whether after the teacher's repair, of captions that it was not fitted to

    def __str__(self) -> str:
        ranks = f"median rank {self.median_rank:,.0f} of {self.candidates:,} (chance {self.chance_rank:,.0f})"
        recalls = ((1, self.recall_at_1, self.chance_at_1), (10, self.recall_at_10, self.chance_at_10))
        shares = [f"R@{k} {100 * recall:.1f}% (chance {100 * chance:.2g}%)" for k, recall, chance in recalls]
        return f"{ranks}, {', '.join(shares)}"

    def describe(self) -> str:
        """Say how well a teacher knows the data, without a full stop."""
        state = ", after its repair" if self.repaired else ""
        return f"Teacher on these captions{state}: {self}"
