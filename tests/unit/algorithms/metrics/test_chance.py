"""What a guess scores, against guesses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.metrics.chance import guess_captions, guess_classes, guess_order, largest_class
from clipcid_cli.algorithms.metrics.classification import measure_scores
from clipcid_cli.algorithms.metrics.retrieval import retrieval_metrics, retrieval_ranks

GUESSES = 400


def mean_of(guesses: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([guess[name] for guess in guesses])) for name in guesses[0]}


def test_recalls_by_chance_are_those_of_random_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = torch.tensor([1, 3, 1, 2, 5, 1, 1, 9, 1, 1, 2, 1])
    owners = torch.repeat_interleave(torch.arange(len(captions)), captions)

    def guess() -> dict[str, float]:
        images, texts = (torch.randn(count, 16, generator=generator) for count in (len(captions), len(owners)))
        return retrieval_metrics(retrieval_ranks(images, texts, owners), owners).values()

    chance = guess_captions(captions.numpy())
    assert mean_of([guess() for _ in range(GUESSES)]) == pytest.approx(chance, abs=0.02)
    assert chance["image_retrieval_recall@5"] == 5 / 12


def test_recall_of_fewer_images_than_it_asks_for_is_certain() -> None:
    assert guess_captions(np.array([1, 1, 2]))["image_retrieval_recall@10"] == 1
    assert guess_captions(np.array([1, 1, 2]))["text_retrieval_recall@10"] == 1


def test_recalls_by_chance_of_one_caption_an_image_are_alike_both_ways() -> None:
    chance = guess_captions(np.ones(500, np.int64))
    for k in (1, 5, 10):
        assert chance[f"text_retrieval_recall@{k}"] == chance[f"image_retrieval_recall@{k}"] == k / 500


def test_accuracy_by_chance_and_by_the_largest_class() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(8), torch.tensor([2, 2, 2, 2, 2, 2, 2, 26]))
    found = mean_of(
        [measure_scores([torch.rand(len(labels), 8, generator=generator)], labels, 8) for _ in range(GUESSES)]
    )
    assert found == pytest.approx(guess_classes(8), abs=0.02)
    assert largest_class(labels.numpy()) == 26 / 40
    assert "acc5" not in guess_classes(4)


def test_average_precision_by_chance_is_the_share_of_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.zeros(400, 3, dtype=torch.bool)
    positive[:200, 0] = positive[:40, 1] = True
    found = mean_of([measure_scores([torch.rand(400, 3, generator=generator)], positive, 3) for _ in range(50)])
    chance = guess_order(positive.numpy())
    assert chance == {"mean_average_precision": pytest.approx((0.5 + 0.1) / 2)}
    assert found["mean_average_precision"] == pytest.approx(chance["mean_average_precision"], abs=0.02)
