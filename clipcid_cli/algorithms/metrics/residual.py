"""How sure a rate is that was counted in a sample.

Source: Clopper and Pearson 1934; with no hit the upper end is the "rule of three", about 3.7/n for two-sided 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_TAIL = 0.025


def rate_interval(hits: int, trials: int) -> tuple[float, float]:
    """Bound a rate from both sides: the Clopper-Pearson interval of 95 %.

    Args:
        hits: How often it was seen, in [0, trials].
        trials: In how many independent tries; at least 1.

    Returns:
        The ends of the interval, in [0, 1].

    Raises:
        ValueError: when the counts do not fit together.
    """
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits in {trials} trials")
    low = 0.0 if hits == 0 else _solve(lambda rate: 1.0 - _at_most(hits - 1, trials, rate) < _TAIL)
    high = 1.0 if hits == trials else _solve(lambda rate: _at_most(hits, trials, rate) > _TAIL)
    return low, high


def _solve(lies_below: Callable[[float], bool]) -> float:
    """Find the rate up to which a statement holds, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if lies_below(middle) else (low, middle)
    return high


def _at_most(hits: int, trials: int, rate: float) -> float:
    """Return the probability of at most so many hits at a rate in (0, 1)."""
    if rate <= 0.0 or rate >= 1.0:
        return 1.0 if rate <= 0.0 or hits >= trials else 0.0
    count = np.arange(hits + 1)
    # log C(n, k) from C(n, k) = C(n, k−1)·(n−k+1)/k.
    choices = np.concatenate([[0.0], np.cumsum(np.log((trials - count[1:] + 1.0) / count[1:]))])
    return float(np.exp(choices + count * math.log(rate) + (trials - count) * math.log1p(-rate)).sum())
