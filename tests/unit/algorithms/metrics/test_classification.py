"""Metrics of classifications against scikit-learn and formulas written another way."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from clipcid_cli.algorithms.metrics.classification import (
    accuracy_metrics,
    class_weights,
    compare_accuracies,
    count_ties,
    measure_scores,
    rank_classes,
    top_classes,
)


def random_scores(images: int, classes: int, seed: int) -> torch.Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(seed))


def test_class_weight_is_the_normalised_mean_of_normalised_prompts() -> None:
    prompts = torch.tensor([[[3.0, 0.0], [0.0, 0.5]], [[0.0, 2.0], [0.0, 7.0]]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(class_weights(prompts), torch.tensor([[half, half], [0.0, 1.0]]))


def test_metrics_agree_with_scikit_learn_in_any_blocks() -> None:
    scores, labels = random_scores(300, 12, seed=0), torch.arange(300) % 11  # class 11 has no image
    scores[torch.arange(300), labels] += 1
    predicted = scores.argmax(dim=1)
    for size in (300, 7):
        metrics = measure_scores(torch.split(scores, size), labels, num_classes=12)
        assert metrics["acc1"] == pytest.approx(float((predicted == labels).double().mean()), abs=1e-12)
        assert metrics["acc5"] == pytest.approx(
            top_k_accuracy_score(labels, scores, k=5, labels=np.arange(12)), abs=1e-12
        )
        recalls = [float((predicted == number)[labels == number].double().mean()) for number in range(11)]
        assert metrics["mean_per_class_recall"] == pytest.approx(np.mean(recalls), abs=1e-12)


def test_acc5_says_nothing_below_five_classes() -> None:
    metrics = accuracy_metrics(np.arange(4), np.zeros(4, int), num_classes=4)
    assert metrics.values()["acc1"] == 1.0
    assert math.isnan(metrics.values()["acc5"])
    assert "acc5" not in metrics.intervals(10, seed=0)


def test_equal_similarities_count_in_class_order() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    predictions, ranks = rank_classes(scores, torch.tensor([0, 1, 2]))
    assert predictions.tolist() == [0, 0, 0]
    assert ranks.tolist() == [0, 1, 2]
    assert top_classes(scores)[1].tolist() == [[0, 1, 2]] * 3
    assert count_ties(torch.cat([scores, torch.tensor([[0.5, 0.2, 0.2]])])) == 3
    assert count_ties(scores[:, :1]) == 0


@pytest.mark.parametrize("spoilt", ["image", "own class", "other class", "everything"])
def test_a_similarity_that_is_nan_never_counts_for_the_model(spoilt: str) -> None:
    scores, labels = torch.eye(6), torch.arange(6)
    if spoilt == "image":
        scores[2] = math.nan
    elif spoilt == "own class":
        scores[labels, labels] = math.nan
    elif spoilt == "other class":  # every comparison with it is undecided
        scores = torch.cat([scores, torch.full((6, 1), math.nan)], dim=1)
    else:
        scores[:] = math.nan
    metrics = measure_scores([scores], labels, num_classes=scores.shape[1])
    right = {"image": 5 / 6, "own class": 0.0, "other class": 0.0, "everything": 0.0}[spoilt]
    assert metrics["acc1"] == metrics["mean_per_class_recall"] == pytest.approx(right)


def test_two_models_are_compared_by_the_metrics_of_each() -> None:
    labels = torch.arange(120) % 7
    ranks, expected = [], []
    for seed, strength in ((1, 0.5), (2, 2.5)):
        scores = random_scores(120, 7, seed)
        scores[torch.arange(120), labels] += strength
        ranks.append(rank_classes(scores, labels)[1].numpy())
        expected.append(measure_scores([scores], labels, 7))
    found = compare_accuracies(labels.numpy(), ranks[:1], ranks[1:], num_classes=7, replicates=300, seed=0)
    assert set(found) == set(expected[0])
    for name, metric in found.items():
        assert (*metric.first, *metric.second) == pytest.approx((expected[0][name], expected[1][name]))
        low, high = metric.interval
        assert low < metric.difference < high
        assert (metric.p_value is None) == (name == "mean_per_class_recall")
    assert found["acc1"].is_significant
    same = compare_accuracies(labels.numpy(), ranks[:1], ranks[:1], num_classes=7, replicates=50, seed=0)
    assert all(metric.interval == (0, 0) and not metric.is_significant for metric in same.values())
    assert "acc5" not in compare_accuracies(labels.numpy(), ranks[:1], ranks[1:], num_classes=4, replicates=5, seed=0)
