"""Metrics of classifications and retrieval against scikit-learn and plain definitions, with ties, NaN and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, precision_recall_curve, top_k_accuracy_score

from clipcid_cli.algorithms.metrics import retrieval
from clipcid_cli.algorithms.metrics.classification import (
    average_precision,
    count_ties,
    measure_scores,
    precision_metrics,
    rank_classes,
    top_classes,
)
from clipcid_cli.algorithms.metrics.retrieval import RECALL_AT, retrieval_metrics, retrieval_ranks


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


def measure(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    areas, points = average_precision(np.ones((1, len(scores)), np.int64), scores, positive)
    return areas[0], points[0]


def eleven_points(scores: np.ndarray, positive: np.ndarray) -> float:
    """The best precision at each of eleven recalls, from scikit-learn's whole curve and in whole numbers."""
    precision, recall, _ = precision_recall_curve(positive, scores)
    found = np.rint(recall * positive.sum()).astype(int)
    curve = list(zip(precision, found, strict=True))[:-1]  # the last point is scikit-learn's own (1, 0)
    return float(np.mean([max(p for p, f in curve if 10 * f >= t * positive.sum()) for t in range(11)]))


@settings(max_examples=30)
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


NEVER = torch.iinfo(torch.int64).max


@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(1, 12),
    num_texts=st.integers(1, 20),
    chunk_entries=st.integers(1, 300),
)
@settings(max_examples=30)
def test_ranks_and_recalls_are_those_of_the_definition(
    seed: int, num_images: int, num_texts: int, chunk_entries: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Small integers: products are exact in any order of summation, and ties are common.
    images = torch.randint(-1, 2, (num_images, 3), generator=generator).float()
    texts = torch.randint(-1, 2, (num_texts, 3), generator=generator).float()
    own = torch.randint(0, num_images, (num_texts,), generator=generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_CHUNK_ENTRIES", chunk_entries)
        image_ranks, text_ranks = retrieval.retrieval_ranks(images, texts, own)

    by_image = torch.sort(texts @ images.T, dim=1, descending=True, stable=True).indices.tolist()
    assert image_ranks.tolist() == [row.index(image) for row, image in zip(by_image, own.tolist(), strict=True)]
    by_text = torch.sort(images @ texts.T, dim=1, descending=True, stable=True).indices
    for image, rank in enumerate(text_ranks.tolist()):
        found = (own[by_text[image]] == image).nonzero()
        assert rank == (int(found[0]) if len(found) else NEVER)
    metrics = retrieval_metrics(retrieval_ranks(images, texts, own), own).values()
    for k in RECALL_AT:
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(float((image_ranks < k).double().mean()))
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(float((text_ranks < k).double().mean()))


def test_a_similarity_that_is_nan_is_not_found_however_few_the_candidates() -> None:
    images, texts = torch.eye(3), torch.eye(3)
    images[1] = torch.nan
    image_ranks, text_ranks = retrieval.retrieval_ranks(images, texts, torch.arange(3))
    # Image 1 comes before the right one for captions 0 and 2: nothing says that it is less similar.
    assert (image_ranks.tolist(), text_ranks.tolist()) == ([1, NEVER, 1], [0, NEVER, 0])
    missing = retrieval_ranks(torch.full((3, 3), torch.nan), texts, torch.arange(3))
    nothing = retrieval_metrics(missing, torch.arange(3)).values()
    assert set(nothing.values()) == {0.0}
