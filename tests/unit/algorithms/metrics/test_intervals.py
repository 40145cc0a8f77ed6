"""Intervals against images drawn one by one, exact tests against SciPy's binomial, and what counts as a difference."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from clipcid_cli.algorithms.metrics.classification import accuracy_metrics
from clipcid_cli.algorithms.metrics.intervals import (
    CellMetrics,
    PairedMetric,
    clopper_pearson,
    compare,
    compare_means,
    find_cells,
    interval,
    interval_of_mean,
    mcnemar,
    ratio,
)


def make_ranks(count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 7, count)
    return labels, (generator.random(count) >= 0.1 + 0.1 * labels).astype(np.int64)


def test_intervals_are_those_of_images_drawn_one_by_one() -> None:
    labels, ranks = make_ranks(400)
    metrics = accuracy_metrics(labels, ranks, 7)
    drawn = metrics.draw(4000, seed=1)
    generator = np.random.default_rng(2)
    plain: dict[str, list[float]] = {"acc1": [], "mean_per_class_recall": []}
    for _ in range(4000):
        images = generator.integers(0, 400, 400)
        right = ranks[images] == 0
        plain["acc1"].append(right.mean())
        plain["mean_per_class_recall"].append(
            np.mean([right[labels[images] == number].mean() for number in np.unique(labels[images])])
        )
    # Both sides are random; 4,000 draws place the ends of an interval to about a tenth of its width.
    for name, values in plain.items():
        assert drawn[name].mean() == pytest.approx(np.mean(values), abs=0.003)
        assert metrics.intervals(4000, seed=1)[name] == pytest.approx(interval(np.array(values)), abs=0.01)
    assert metrics.intervals(20, seed=3) == metrics.intervals(20, seed=3) != metrics.intervals(20, seed=4)
    assert metrics.intervals(0, seed=3) == {}


def test_groups_are_drawn_whole() -> None:
    """As by the definition: groups are drawn with replacement, each with all its images."""
    generator = np.random.default_rng(0)
    groups = np.sort(generator.integers(0, 40, 400))
    difficulty = generator.random(40)
    labels = generator.integers(0, 3, 400)
    ranks = (generator.random(400) < difficulty[groups]).astype(np.int64)
    alone = accuracy_metrics(labels, ranks, 3)
    metrics = dataclasses.replace(alone, groups_N=groups)
    assert metrics.values()["acc1"] == alone.values()["acc1"]
    plain = [
        np.concatenate([ranks[groups == group] == 0 for group in generator.integers(0, 40, 40)]).mean()
        for _ in range(1000)
    ]
    low, high = metrics.intervals(1000, seed=1)["acc1"]
    assert (low, high) == pytest.approx(interval(np.array(plain)), abs=0.02)
    of_images = alone.intervals(1000, seed=1)["acc1"]
    assert high - low > 1.5 * (of_images[1] - of_images[0])
    # A group of each image: images are drawn one by one.
    each = dataclasses.replace(alone, groups_N=np.arange(400)).intervals(1000, seed=1)["acc1"]
    assert each == pytest.approx(of_images, abs=0.015)
    # Copies of images tell nothing new: of 20 of each the interval is that of one, and McNemar's test does not hold.
    first, second = (accuracy_metrics(labels, side, 3) for side in (ranks, np.roll(ranks, 5)))
    copies = [CellMetrics(np.repeat(side.cells_N, 20), side.of_draws) for side in (first, second)]
    once = compare([first], [second], 1000, 0)["acc1"].interval
    copied = compare(copies[:1], copies[1:], 1000, 0, {"acc1": 0.01}, np.repeat(np.arange(400), 20))["acc1"]
    assert copied.interval == pytest.approx(once, abs=0.015)
    assert copied.p_value is None


def test_the_mean_over_data_sets_is_as_sure_as_independent_draws_make_it() -> None:
    sides = [make_seeds([0.5, 0.6])] * 4  # equal cells, and so equal draws of each
    metrics = [compare(models[:1], models[1:], 4000, seed=0)["share"] for models in sides]
    low, high = compare_means(metrics, 4000, seed=0).interval
    one = metrics[0].interval
    assert high - low == pytest.approx((one[1] - one[0]) / 2, rel=0.06)
    assert compare_means(metrics, 4000, seed=0).difference == pytest.approx(metrics[0].difference)
    # Seeds that differ alike on all data sets are no surer on their mean.
    models = make_seeds([0.50, 0.51, 0.52, 0.50, 0.71, 0.92])
    (of_seeds,) = compare(models[:3], models[3:], 4000, seed=0).values()
    mean = compare_means([of_seeds] * 4, 4000, seed=0)
    assert mean.interval == pytest.approx(of_seeds.interval, abs=0.03)
    assert not mean.is_significant
    # Of metrics that were measured before, by their intervals.
    assert interval_of_mean([0.5, 0.7], [(0.47, 0.56), (0.66, 0.78)]) == pytest.approx((0.575, 0.65))
    assert interval_of_mean([0.2], [(0.1, 0.25)]) == pytest.approx((0.1, 0.25))


def make_seeds(rates: list[float]) -> list[CellMetrics]:
    """Models that have these shares of the same images right, each of its own."""
    generator = np.random.default_rng(0)
    right = np.stack([generator.random(500) < rate for rate in rates], axis=1)
    cells, cell_of = find_cells(right.astype(np.int64))
    return [
        CellMetrics(cell_of, lambda draws, seed=seed: {"share": ratio(draws, cells[:, seed])})
        for seed in range(len(rates))
    ]


def test_a_shift_larger_than_images_and_seeds_explain_is_found() -> None:
    models = make_seeds([0.50, 0.51, 0.52, 0.70, 0.71, 0.72])
    (found,) = compare(models[:3], models[3:], 1000, seed=0).values()
    assert found.interval[0] < 0.2 < found.interval[1]
    assert found.is_significant
    # The same mean difference, of seeds that disagree: each image draw is as sure, but not the next seed.
    models = make_seeds([0.50, 0.51, 0.52, 0.50, 0.71, 0.92])
    (found,) = compare(models[:3], models[3:], 1000, seed=0).values()
    assert found.difference == pytest.approx(0.2, abs=0.05)
    assert not found.is_significant


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_where_images_decide_nothing_the_interval_is_that_of_the_paired_t_test(num_seeds: int) -> None:
    values = 0.1 * np.random.default_rng(num_seeds).random((2, num_seeds))  # no bound is reached
    cells = np.zeros(9, np.int64)
    sides = [
        [CellMetrics(cells, lambda draws, value=value: {"share": np.full(len(draws), value)}) for value in side]
        for side in values
    ]
    (found,) = compare(sides[0], sides[1], 4000, seed=0).values()
    expected = ttest_rel(values[1], values[0]).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=0.02)


def test_two_seeds_decide_nothing_and_no_difference_is_beyond_all() -> None:
    apart = [(0.30, 0.70), (0.10, 0.90)]
    sides = [make_seeds([first for first, _ in apart]), make_seeds([second for _, second in apart])]
    (found,) = compare(*sides, 1000, seed=0).values()
    assert found.interval == (-1.0, 1.0)
    alike = PairedMetric([0.5, 0.5], [0.6, 0.6], (0.09, 0.11))
    assert alike.excludes_zero
    assert not alike.has_enough_seeds
    assert not alike.is_significant
    assert PairedMetric([0.5] * 3, [0.6] * 3, (0.09, 0.11)).is_significant


def test_a_difference_needs_interval_and_test() -> None:
    assert PairedMetric([0.5], [0.52], (0.01, 0.03)).is_significant
    assert PairedMetric([0.5], [0.52], (0.01, 0.03), p_value=0.049).is_significant
    assert not PairedMetric([0.5], [0.52], (0.01, 0.03), p_value=0.05).is_significant
    assert not PairedMetric([0.5], [0.51], (-0.01, 0.03)).is_significant
    assert PairedMetric([0.52], [0.5], (-0.03, -0.01)).excludes_zero


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (0, 6), (10, 25), (700, 900), (5000, 4990)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    one, other = (
        np.repeat([True, False, True], [first, second, 9]),
        np.repeat([False, True, True], [first, second, 9]),
    )
    assert mcnemar(one, other) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(one, other) == mcnemar(other, one)


@pytest.mark.parametrize(
    ("hits", "trials"),
    [(0, 1), (1, 1), (0, 30_000), (17, 30_000), (30_000, 30_000), (29_990, 30_000)],
)
def test_the_interval_of_a_rate_is_scipys(hits: int, trials: int) -> None:
    # SciPy stops at an absolute error of 2e-12.
    expected = binomtest(hits, trials).proportion_ci(confidence_level=0.95, method="exact")
    np.testing.assert_allclose(clopper_pearson(hits, trials), (expected.low, expected.high), rtol=1e-9, atol=1e-11)
