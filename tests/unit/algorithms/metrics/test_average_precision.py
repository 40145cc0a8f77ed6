"""Average precision against scikit-learn, of drawn images, and of classes that no image has."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, precision_recall_curve

from clipcid_cli.algorithms.metrics.classification import average_precision, precision_metrics


def measure(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    areas, points = average_precision(np.ones((1, len(scores)), np.int64), scores, positive)
    return areas[0], points[0]


def eleven_points(scores: np.ndarray, positive: np.ndarray) -> float:
    """The best precision at each of eleven recalls, from scikit-learn's whole curve and in whole numbers."""
    precision, recall, _ = precision_recall_curve(positive, scores)
    found = np.rint(recall * positive.sum()).astype(int)
    curve = list(zip(precision, found, strict=True))[:-1]  # the last point is scikit-learn's own (1, 0)
    return float(np.mean([max(p for p, f in curve if 10 * f >= t * positive.sum()) for t in range(11)]))


@given(
    scores=arrays.arrays(np.int64, (23, 4), elements=st.integers(0, 9)),  # few values, so that many are equal
    positive=arrays.arrays(np.bool_, (23, 4)),
)
def test_both_forms_agree_with_scikit_learn_with_ties(scores: np.ndarray, positive: np.ndarray) -> None:
    areas, points = measure(scores, positive)
    for number in range(4):
        expected = math.nan, math.nan
        if positive[:, number].any():
            own = scores[:, number], positive[:, number]
            expected = average_precision_score(own[1], own[0]), eleven_points(*own)
        assert (areas[number], points[number]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_draw_is_the_metric_of_repeated_images() -> None:
    generator = np.random.default_rng(5)
    scores = generator.integers(0, 12, (40, 3)) / 12  # many equal scores
    positive = generator.random((40, 3)) < 0.3
    drawn = precision_metrics(scores, positive).draw(6, seed=7)
    weights = np.random.default_rng(7).multinomial(40, np.full(40, 1 / 40), size=6)
    for row, weight in enumerate(weights):
        images = np.repeat(np.arange(40), weight)
        values = precision_metrics(scores[images], positive[images]).values()
        assert values == pytest.approx({name: drawn[name][row] for name in values}, abs=1e-12)


def test_classes_without_images_are_left_out_of_the_mean() -> None:
    scores, positive = np.array([[0.9, 0.1], [0.2, 0.3]]), np.array([[True, False], [False, False]])
    values = precision_metrics(scores, positive).values()
    assert values == {"mean_average_precision": 1.0, "mean_average_precision_11_point": 1.0}
    assert math.isnan(measure(scores, positive)[0][1])
    nothing = precision_metrics(scores, np.zeros((2, 2), bool))
    assert all(math.isnan(value) for value in nothing.values().values())
    assert nothing.intervals(10, seed=0) == {}
    with pytest.raises(ValueError, match="NaN"):
        precision_metrics(np.full((3, 2), math.nan), np.ones((3, 2), bool))
