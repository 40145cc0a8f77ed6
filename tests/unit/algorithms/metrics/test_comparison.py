"""Two models on the same images: values are those of each alone, and what counts as a difference."""

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.metrics.average_precision import average_precision
from clipcid_cli.algorithms.metrics.comparison import (
    ClassPredictions,
    PairedMetric,
    RetrievalRanks,
    compare_classification,
    compare_multi_label,
    compare_retrieval,
)
from clipcid_cli.algorithms.metrics.retrieval import recall_metrics, retrieval_ranks
from clipcid_cli.algorithms.metrics.zeroshot import (
    classification_metrics,
    confuse_classes,
    rank_classes,
    top_classes,
)


def make_rows(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


def test_classification_compares_the_metrics_of_each_model() -> None:
    labels, weights = torch.arange(120) % 7, make_rows(7, 8, 0)
    sides, expected = [], []
    for seed, noise in ((1, 1.0), (2, 0.2)):
        images = torch.nn.functional.normalize(weights[labels] + noise * make_rows(120, 8, seed), dim=1)
        predicted, ranks = rank_classes(images, weights, labels)
        sides.append(ClassPredictions(predicted.numpy(), top_classes(images, weights)[1].numpy()))
        expected.append(classification_metrics(ranks, labels, 7))
    found = compare_classification(labels.numpy(), *sides, num_classes=7, replicates=300, seed=0)
    assert set(found) == set(expected[0])
    for name, metric in found.items():
        assert (metric.first, metric.second) == pytest.approx((expected[0][name], expected[1][name]))
        low, high = metric.interval
        assert low < metric.difference < high or metric.difference == 0
    assert found["acc1"].is_significant
    same = compare_classification(labels.numpy(), sides[0], sides[0], num_classes=7, replicates=50, seed=0)
    assert all(metric.interval == (0, 0) and not metric.is_significant for metric in same.values())
    assert "acc5" not in compare_classification(labels.numpy(), *sides, num_classes=4, replicates=5, seed=0)


def test_retrieval_compares_the_recalls_of_each_model_with_captions_by_image() -> None:
    captions = torch.tensor([1, 3, 2] * 10)
    owner = torch.repeat_interleave(torch.arange(30), captions)
    ranks = [retrieval_ranks(make_rows(30, 6, seed), make_rows(60, 6, seed + 9), owner) for seed in (0, 1)]
    found = compare_retrieval(captions, *(RetrievalRanks(*side) for side in ranks), replicates=50, seed=0)
    expected = [recall_metrics(*side) for side in ranks]
    assert list(found) == list(expected[0])
    for name, metric in found.items():
        assert (metric.first, metric.second) == pytest.approx((expected[0][name], expected[1][name]))
        # Captions of one image are no independent trials.
        assert (metric.p_value is None) == name.startswith("image")


def test_multi_label_compares_both_forms_of_average_precision() -> None:
    positive = np.random.default_rng(0).random((40, 3)) < 0.4
    scores = [np.random.default_rng(seed).random((40, 3)) for seed in (1, 2)]
    found = compare_multi_label(positive, *scores, replicates=20, seed=0)
    for place, side in enumerate(scores):
        precision = average_precision(torch.from_numpy(side), torch.from_numpy(positive))
        values = [(metric.first, metric.second)[place] for metric in found.values()]
        assert values == [precision.mean_area, precision.mean_eleven_point]


def test_a_difference_needs_interval_and_test() -> None:
    above, around = np.linspace(0.01, 0.03, 50), np.linspace(-0.01, 0.03, 50)
    assert PairedMetric(0.5, 0.52, above).is_significant
    assert PairedMetric(0.5, 0.52, above, p_value=0.049).is_significant
    assert not PairedMetric(0.5, 0.52, above, p_value=0.05).is_significant
    assert not PairedMetric(0.5, 0.51, around).is_significant
    assert PairedMetric(0.52, 0.5, -above).excludes_zero


def test_a_class_is_confused_with_the_wrong_class_predicted_most_often() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 2, 1, 2, 1, 1, 0])
    found = [
        (one.images, one.correct, one.confused_with, one.confused) for one in confuse_classes(labels, predicted, 4)
    ]
    assert found == [(4, 1, 2, 2), (2, 2, None, 0), (0, 0, None, 0), (1, 0, 0, 1)]
