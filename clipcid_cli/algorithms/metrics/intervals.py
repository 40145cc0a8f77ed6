"""How much a metric depends on the sample of images: it is a function of how often each image counts.

Its value is that of one draw, in which every image counts once. Its interval is that of draws with replacement. Two models
are compared over the same draws, so what makes an image easy or hard for both cancels out of the difference. Where there are
several seeds of each, the mean difference of their pairs is a function of draws too; how much it depends on seeds is added.

Images that belong together, as near copies do, are no independent evidence: where there are groups, these are drawn instead,
each with all its images.

A metric of counts depends on how many images fall into each cell (class × right or wrong × …), and of images drawn with
replacement the counts of cells are multinomial. So cells are drawn instead: the same distribution as drawing images one by
one. Where images are right or wrong, cells are few, and the cost does not grow with the number of images.

Shape letters beside those of the map: V values of an image, U cells, B draws, S pairs of seeds.

Source: Efron 1979; for counts Efron and Tibshirani 1993, §5.2; for groups Davison and Hinkley 1997, §3.8.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MIN_SEEDS = 3
"""Seeds of each side that a verdict on several needs: two of them say nearly nothing of how seeds differ."""

_CHUNK_ENTRIES = 2**24
_TAIL = 0.025
_SIGNIFICANCE = 0.05


@dataclasses.dataclass(frozen=True)
class CellMetrics:
    """The metrics of one model on one data set."""

    cells_N: Array  # cell of each image, int64
    # From draws (how many images of each cell count, int64 [B, U]) to the metrics of each, float64 [B], by name; NaN
    # where a draw has none.
    of_draws: Callable[[Array], dict[str, Array]]
    groups_N: Array | None = None  # group of each image, int64 from 0; None draws images one by one

    @cached_property
    def sizes(self) -> Array:
        """Number of images in each cell, int64 [U]."""
        return np.bincount(self.cells_N)

    @cached_property
    def sizes_by_group(self) -> Any:
        """Number of images of each group in each cell, int64 [G, U], sparse."""
        from scipy.sparse import csr_array

        return csr_array((np.ones(len(self.cells_N), np.int64), (self.groups_N, self.cells_N)))

    def values(self) -> dict[str, float]:
        """Return the metrics of the images as they are; NaN where they have none."""
        return {name: float(value_1[0]) for name, value_1 in self.of_draws(self.sizes[None]).items()}

    def draw(self, replicates: int, seed: int) -> dict[str, Array]:
        """Return the metrics of images drawn with replacement, float64 [B]; equal seeds draw the same images."""
        generator = np.random.default_rng(seed)
        drawn = len(self.sizes) if self.groups_N is None else max(self.sizes_by_group.shape)
        at_once = max(1, _CHUNK_ENTRIES // drawn)
        parts = [
            self.of_draws(self._count(generator, min(at_once, replicates - start)))
            for start in range(0, replicates, at_once)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _count(self, generator: np.random.Generator, size: int) -> Array:
        """Draw how many images of each cell count, int64 [B, U]."""
        if self.groups_N is None:
            total = len(self.cells_N)
            return generator.multinomial(total, self.sizes / total, size)
        groups = self.sizes_by_group.shape[0]
        return np.asarray(generator.multinomial(groups, np.full(groups, 1 / groups), size) @ self.sizes_by_group)

    def intervals(self, replicates: int, seed: int) -> dict[str, tuple[float, float]]:
        """Return the 95 % interval of each metric that has a value; none without replicates."""
        if not replicates:
            return {}
        drawn, values = self.draw(replicates, seed), self.values()
        return {name: interval(drawn[name]) for name, value in values.items() if not math.isnan(value)}


def find_cells(values_NV: Array) -> tuple[Array, Array]:
    """Return the distinct rows of numbers, [U, V] in lexicographic order, and which one each image has, int64 [N]."""
    cells_UV, cells_N = np.unique(values_NV, axis=0, return_inverse=True)
    return cells_UV, cells_N.reshape(-1)


def ratio(draws_BU: Array, above_U: Array, below_U: Array | None = None) -> Array:
    """Sum one value over the drawn images and divide by the sum of another (by their number when None): float64 [B]."""
    below_B = draws_BU.sum(axis=1) if below_U is None else draws_BU @ below_U
    return np.asarray(draws_BU @ above_U / below_B)


def mean_of_drawn(values_BC: Array) -> Array:
    """Return the mean over the classes that were drawn, float64 [B]; those that were not are NaN, as is a mean of none."""
    drawn_B = (~np.isnan(values_BC)).sum(axis=1)
    return np.where(drawn_B > 0, np.nansum(values_BC, axis=1) / np.maximum(drawn_B, 1), np.nan)


def interval_of_mean(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of metrics of different images, from their own: what they are off is squared.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures" (MOVER), for a sum.
    """
    # An interval of a metric that takes the worst of some groups may be on one side of its value.
    below = math.hypot(*(max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)))
    above = math.hypot(*(max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)))
    return fmean(values) - below / len(values), fmean(values) + above / len(values)


def interval(drawn_B: Array) -> tuple[float, float]:
    """Return the percentile interval with 95 % of the draws; those that are NaN do not count."""
    low, high = np.nanquantile(drawn_B, [_TAIL, 1 - _TAIL])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class PairedMetric:
    """A metric of two models on the same images, and the 95 % interval of the difference, second minus first."""

    first: list[float]  # a value for each seed, one for a single model
    second: list[float]  # the same; seeds are paired by their place
    interval: tuple[float, float]
    # McNemar's, where the metric counts images that are right or wrong, each drawn by itself, and there is one pair.
    p_value: float | None = None
    # The difference in each draw of the images, for `compare_means`.
    drawn_B: Array = dataclasses.field(default_factory=lambda: np.empty(0))

    @property
    def difference(self) -> float:
        """Second minus first, of several seeds their means."""
        return fmean(self.second) - fmean(self.first)

    @property
    def excludes_zero(self) -> bool:
        low, high = self.interval
        return low > 0 or high < 0

    @property
    def has_enough_seeds(self) -> bool:
        """Whether there are seeds enough for a verdict, or one pair, where the question is of images alone."""
        return len(self.first) == 1 or len(self.first) >= MIN_SEEDS

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 and McNemar's test, where it applies, agrees at the 5 % level."""
        return self.has_enough_seeds and self.excludes_zero and (self.p_value is None or self.p_value < _SIGNIFICANCE)


def compare(
    first_S: Sequence[CellMetrics],
    second_S: Sequence[CellMetrics],
    replicates: int,
    seed: int,
    p_values: Mapping[str, float] | None = None,
    groups_N: Array | None = None,
) -> dict[str, PairedMetric]:
    """Compare each metric with a value of two models or as many seeds of each, on equal cells; some have McNemar's p.

    Args:
        groups_N: Group of each image, int64 from 0; None draws images one by one.
    """

    def mean_differences(draws_BU: Array) -> dict[str, Array]:
        drawn_S = [(first.of_draws(draws_BU), second.of_draws(draws_BU)) for first, second in pairs_S]
        return {
            name: np.mean([second[name] - first[name] for first, second in drawn_S], axis=0) for name in drawn_S[0][0]
        }

    pairs_S = list(zip(first_S, second_S, strict=True))
    drawn = CellMetrics(first_S[0].cells_N, mean_differences, groups_N).draw(replicates, seed)
    values_S = [(first.values(), second.values()) for first, second in pairs_S]
    compared = {}
    for name, value in values_S[0][0].items():
        if math.isnan(value):
            continue
        first = [values[name] for values, _ in values_S]
        second = [values[name] for _, values in values_S]
        errors_B = errors_of_mean(np.subtract(second, first), replicates, seed)
        # McNemar's test is of independent images.
        p_value = p_values.get(name) if p_values and groups_N is None else None
        # Metrics are in [0, 1], and so no difference is beyond 1, as Student's t of two seeds would have it.
        bounds = interval((drawn[name] + errors_B).clip(-1, 1))
        compared[name] = PairedMetric(first, second, bounds, p_value, drawn[name])
    return compared


def compare_means(metrics: Sequence[PairedMetric], replicates: int, seed: int) -> PairedMetric:
    """Compare the means of several data sets' metrics; the same seeds of each side in all of them."""
    first, second = (
        [fmean(values) for values in zip(*sides, strict=True)]
        for sides in ([metric.first for metric in metrics], [metric.second for metric in metrics])
    )
    # Equal seeds have drawn alike in every data set; in random order what they drew is independent.
    generator = np.random.default_rng((seed, len(first), len(metrics)))
    drawn_B = np.mean([generator.permutation(metric.drawn_B) for metric in metrics], axis=0)
    errors_B = errors_of_mean(np.subtract(second, first), replicates, seed)
    return PairedMetric(first, second, interval((drawn_B + errors_B).clip(-1, 1)))


def errors_of_mean(values_S: Array, replicates: int, seed: int) -> Array:
    """Draw by how much the mean of a few seeds is off, float64 [B]: Student's t, evenly spaced quantiles in random order.

    Seeds are too few to be drawn with replacement as images are: see docs/method.md#zero-shot.
    """
    from scipy.special import stdtrit

    num_seeds = len(values_S)
    if num_seeds == 1:
        return np.zeros(replicates)
    # Not the generator that draws images: what seeds and images add must be independent.
    quantiles_B = (np.random.default_rng((seed, num_seeds)).permutation(replicates) + 0.5) / replicates
    return np.asarray(stdtrit(num_seeds - 1, quantiles_B) * values_S.std(ddof=1) / math.sqrt(num_seeds))


def mcnemar(first_N: Array, second_N: Array) -> float:
    """Return the two-sided p-value, in (0, 1], of which images two models have right if both are equally good.

    Source: McNemar 1947, in its exact (binomial) form.
    """
    from scipy.special import bdtr

    only_first, only_second = int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum())
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def clopper_pearson(hits: int, trials: int) -> tuple[float, float]:
    """Return the exact 95 % confidence interval of a rate, in [0, 1], given the hits of at least one trial.

    Source: Clopper and Pearson 1934; with no hit the upper end is the "rule of three", about 3.7/n for two-sided 95 %.
    """
    from scipy.special import betaincinv

    low = 0.0 if hits == 0 else float(betaincinv(hits, trials - hits + 1, _TAIL))
    high = 1.0 if hits == trials else float(betaincinv(hits + 1, trials - hits, 1 - _TAIL))
    return low, high
