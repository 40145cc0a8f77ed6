"""Zero-shot metrics against formulas written another way."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from clipcid_cli.algorithms.metrics.zeroshot import class_weights, classification_metrics, rank_classes


def unit_rows(*shape: int, seed: int) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def test_class_weight_is_the_normalised_mean_of_normalised_prompts() -> None:
    prompts = torch.tensor([[[3.0, 0.0], [0.0, 0.5]], [[0.0, 2.0], [0.0, 7.0]]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(class_weights(prompts), torch.tensor([[half, half], [0.0, 1.0]]))


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4), (3, 4)])
def test_class_weights_refuse_empty_prompts(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="classes, templates, width"):
        class_weights(torch.zeros(shape))


def test_metrics_agree_with_scikit_learn() -> None:
    images, weights = unit_rows(300, 16, seed=0), unit_rows(12, 16, seed=1)
    labels = torch.randint(0, 11, (300,), generator=torch.Generator().manual_seed(2))  # class 11 has no image
    scores = (images @ weights.T).numpy()

    metrics = classification_metrics(rank_classes(images, weights, labels)[1], labels, num_classes=12)

    assert metrics["acc1"] == pytest.approx((scores.argmax(1) == labels.numpy()).mean(), abs=1e-12)
    assert metrics["acc5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=np.arange(12)), abs=1e-12)
    recalls = [(scores.argmax(1) == c)[labels.numpy() == c].mean() for c in range(11)]
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean(recalls), abs=1e-12)


def test_mean_per_class_recall_is_balanced_accuracy() -> None:
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 0])
    metrics = classification_metrics((predictions != labels).long(), labels, num_classes=3)
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, predictions), abs=1e-12)


def test_acc5_says_nothing_below_five_classes() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    metrics = classification_metrics(torch.zeros(4, dtype=torch.int64), labels, num_classes=4)
    assert metrics["acc1"] == 1.0
    assert math.isnan(metrics["acc5"])


def test_equal_similarities_count_in_class_order() -> None:
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    predictions, ranks = rank_classes(images, weights, torch.tensor([0, 1, 2]))
    assert predictions.tolist() == [0, 0, 0]
    assert ranks.tolist() == [0, 1, 2]


@pytest.mark.parametrize("spoilt", ["image", "own class", "other class", "everything"])
def test_a_similarity_that_is_nan_never_counts_for_the_model(spoilt: str) -> None:
    weights, labels = torch.eye(6), torch.arange(6)
    images = weights.clone()
    if spoilt == "image":
        images[2] = math.nan
    elif spoilt == "own class":
        weights[2] = math.nan
    elif spoilt == "other class":  # every comparison with it is undecided
        weights = torch.cat([weights, torch.full((1, 6), math.nan)])
    else:
        images[:] = math.nan
    _, ranks = rank_classes(images, weights, labels)
    metrics = classification_metrics(ranks, labels, num_classes=len(weights))
    right = {"image": 5 / 6, "own class": 0.0, "other class": 0.0, "everything": 0.0}[spoilt]
    assert metrics["acc1"] == metrics["mean_per_class_recall"] == pytest.approx(right)


def test_label_outside_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels are in \[0, 3\], classes in \[0, 2\]"):
        rank_classes(unit_rows(2, 4, seed=0), unit_rows(3, 4, seed=1), torch.tensor([0, 3]))


def test_no_image_is_refused() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="no image"):
        classification_metrics(none, none, num_classes=3)
