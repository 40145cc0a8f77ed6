"""A metric of several random draws, or of several seeds."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import msgspec


class Draws(msgspec.Struct):
    """A metric of several random draws, or seeds; the standard deviation is None for one, and all are without a value."""

    mean: float | None
    std: float | None
    values: list[float | None]

    @classmethod
    def from_values(cls, values: list[float]) -> Draws:
        if any(math.isnan(value) for value in values):
            return cls(None, None, [None if math.isnan(value) else value for value in values])
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, [*values])
