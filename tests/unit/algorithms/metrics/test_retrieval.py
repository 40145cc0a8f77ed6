"""Recall at k on cases small enough to work out by hand."""

import pytest
import torch

from clipcid_cli.algorithms.metrics.retrieval import (
    RECALL_AT,
    compare_recalls,
    recall_metrics,
    retrieval_metrics,
    retrieval_ranks,
)

NEVER = torch.iinfo(torch.int64).max


def find(images: torch.Tensor, texts: torch.Tensor, own: list[int]) -> tuple[list[int], list[int]]:
    image_ranks, text_ranks = retrieval_ranks(images, texts, torch.tensor(own))
    return image_ranks.tolist(), text_ranks.tolist()


def test_two_captions_an_image() -> None:
    # Captions 0 and 1 belong to image 0, but the second is nearest to image 1; images 1 and 2 have one each.
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 0.1], [0.0, 0.2, 0.8]])
    # For caption 1 the images 0 and 2 tie at 0, and image 0 comes first; image 1 finds caption 1 of image 0 first.
    assert find(torch.eye(3), texts, [0, 0, 1, 2]) == ([0, 1, 0, 0], [0, 1, 0])
    metrics = retrieval_metrics(torch.eye(3), texts, torch.tensor([0, 0, 1, 2]))
    assert metrics["image_retrieval_recall@1"] == pytest.approx(3 / 4)
    assert metrics["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert [value for name, value in metrics.items() if not name.endswith("@1")] == [1.0] * 4


def test_ties_count_in_row_order() -> None:
    same = torch.ones(4, 1)
    assert find(same, same, [0, 1, 2, 3]) == ([0, 1, 2, 3], [0, 1, 2, 3])


def test_a_similarity_that_is_nan_is_not_found_however_few_the_candidates() -> None:
    images, texts = torch.eye(3), torch.eye(3)
    images[1] = torch.nan
    # Image 1 comes before the right one for captions 0 and 2: nothing says that it is less similar.
    assert find(images, texts, [0, 1, 2]) == ([1, NEVER, 1], [0, NEVER, 0])
    nothing = retrieval_metrics(torch.full((3, 3), torch.nan), texts, torch.arange(3))
    assert set(nothing.values()) == {0.0}


def test_image_without_caption_is_not_found() -> None:
    assert find(torch.eye(2), torch.eye(2)[:1], [0]) == ([0], [0, NEVER])


def test_two_models_are_compared_by_the_recalls_of_each() -> None:
    owner = torch.repeat_interleave(torch.arange(30), torch.tensor([1, 3, 2] * 10))
    rows = torch.randn(4, 60, 6, generator=torch.Generator().manual_seed(0))
    ranks = [retrieval_ranks(rows[side][:30], rows[side + 2], owner) for side in (0, 1)]
    found = compare_recalls(ranks[:1], ranks[1:], owner, replicates=50, seed=0)
    expected = [recall_metrics(side, owner) for side in ranks]
    assert list(found) == list(expected[0].values())
    assert len(found) == 2 * len(RECALL_AT)
    for name, metric in found.items():
        values = tuple(side.values()[name] for side in expected)
        assert (*metric.first, *metric.second) == pytest.approx(values)
        drawn = [side.draw(50, seed=0)[name] for side in expected]
        assert drawn[0].min() < values[0] < drawn[0].max()
        # Captions of one image are no independent trials.
        assert (metric.p_value is None) == name.startswith("image")
    for name, metric in compare_recalls(ranks, ranks[::-1], owner, replicates=50, seed=0).items():
        assert metric.first == metric.second[::-1] == pytest.approx([side.values()[name] for side in expected])
        assert metric.difference == pytest.approx(0)
        assert metric.p_value is None
