"""Metrics of classifications against scikit-learn and formulas written another way."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from clipcid_cli.algorithms.metrics.classification import (
    count_ties,
    measure_scores,
    rank_classes,
    top_classes,
)


def random_scores(images: int, classes: int, seed: int) -> torch.Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(seed))


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
