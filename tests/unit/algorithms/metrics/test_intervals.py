"""Bootstrap intervals against images drawn one by one, and McNemar's test against SciPy's binomial."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from clipcid_cli.algorithms.metrics.average_precision import average_precision
from clipcid_cli.algorithms.metrics.intervals import (
    draw_average_precision,
    draw_cells,
    interval,
    mcnemar,
    mean_recall,
    ratio,
)


def make_values(count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 7, count)
    return np.stack([labels, generator.random(count) < 0.1 + 0.1 * labels], axis=1).astype(np.int64)


def test_intervals_are_those_of_images_drawn_one_by_one() -> None:
    values = make_values(400)
    cells, draws = draw_cells(values, 4000, seed=1)
    assert (draws.sum(axis=1) == 400).all()
    generator = np.random.default_rng(2)
    accuracy, recall = [], []
    for _ in range(4000):
        drawn = values[generator.integers(0, 400, 400)]
        accuracy.append(drawn[:, 1].mean())
        present = np.unique(drawn[:, 0])
        recall.append(np.mean([drawn[drawn[:, 0] == number, 1].mean() for number in present]))
    # Both sides are random; 4,000 draws place the ends of an interval to about a tenth of its width.
    for mine, plain in (
        (ratio(draws, cells[:, 1]), accuracy),
        (mean_recall(draws, cells[:, 0], cells[:, 1]), recall),
    ):
        assert mine.mean() == pytest.approx(np.mean(plain), abs=0.003)
        assert interval(mine) == pytest.approx(interval(np.array(plain)), abs=0.01)


def test_equal_seeds_draw_equally() -> None:
    values = make_values(50)
    first, second = draw_cells(values, 20, seed=3), draw_cells(values, 20, seed=3)
    assert (first[1] == second[1]).all()
    assert not (draw_cells(values, 20, seed=4)[1] == first[1]).all()


def test_ratio_of_two_sums() -> None:
    draws = np.array([[2, 1], [0, 3]])
    assert ratio(draws, np.array([1, 2]), np.array([1, 4])).tolist() == [4 / 6, 6 / 12]


def test_a_draw_of_average_precision_is_that_of_repeated_images() -> None:
    generator = np.random.default_rng(5)
    scores = generator.integers(0, 12, (40, 3)) / 12  # many equal scores
    positive = generator.random((40, 3)) < 0.3
    areas, points = draw_average_precision(scores, positive, 6, seed=7)
    weights = np.random.default_rng(7).multinomial(40, np.full(40, 1 / 40), size=6)
    for row, weight in enumerate(weights):
        drawn = np.repeat(np.arange(40), weight)
        found = average_precision(torch.from_numpy(scores[drawn]), torch.from_numpy(positive[drawn]))
        assert areas[row] == pytest.approx(found.mean_area, abs=1e-12)
        assert points[row] == pytest.approx(found.mean_eleven_point, abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (0, 6), (10, 25), (700, 900), (5000, 4990)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        draw_cells(np.zeros((0, 2), np.int64), 10, seed=0)
