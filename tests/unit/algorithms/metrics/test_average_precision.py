"""Average precision against scikit-learn, the definition written as plain loops, and CLIP_benchmark's formula."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, precision_recall_curve

from clipcid_cli.algorithms.metrics.average_precision import average_precision


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
    found = average_precision(torch.from_numpy(scores).float(), torch.from_numpy(positive))
    for number in range(4):
        if not positive[:, number].any():
            assert math.isnan(found.area_C[number])
            assert math.isnan(found.eleven_point_C[number])
            continue
        area = average_precision_score(positive[:, number], scores[:, number])
        assert float(found.area_C[number]) == pytest.approx(area, abs=1e-12)
        points = eleven_points(scores[:, number], positive[:, number])
        assert float(found.eleven_point_C[number]) == pytest.approx(points, abs=1e-12)


def test_area_is_clip_benchmarks_formula_where_no_scores_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 20, generator=generator)
    positive = torch.rand(500, 20, generator=generator) < 0.1
    means = []
    for number in range(20):
        truth = positive[scores[:, number].argsort(descending=True), number]
        precision = truth.double().cumsum(0) / torch.arange(1, 501)
        means.append(float(precision[truth].sum() / truth.sum()))
    assert average_precision(scores, positive).mean_area == pytest.approx(np.mean(means), abs=1e-12)


def test_a_ranking_worked_out_by_hand() -> None:
    # Sorted: right, wrong, right, wrong, wrong. Precision 1 at recall ½, 2/3 at recall 1.
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5]])
    positive = torch.tensor([[True], [False], [True], [False], [False]])
    found = average_precision(scores, positive)
    assert found.mean_area == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)
    assert found.mean_eleven_point == pytest.approx((6 * 1 + 5 * 2 / 3) / 11, abs=1e-12)


def test_classes_without_images_are_left_out_of_the_mean() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3]])
    found = average_precision(scores, torch.tensor([[True, False], [False, False]]))
    assert found.mean_area == 1.0
    assert math.isnan(found.area_C[1])


@pytest.mark.parametrize(
    ("scores", "positive", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4, dtype=torch.bool), r"both must be \[N, C\]"),
        (torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool), "no image"),
        (torch.full((3, 2), math.nan), torch.ones(3, 2, dtype=torch.bool), "NaN"),
    ],
)
def test_what_cannot_be_ranked_is_refused(scores: torch.Tensor, positive: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_precision(scores, positive)
