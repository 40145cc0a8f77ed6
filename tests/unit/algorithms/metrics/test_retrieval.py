"""Recall at k on cases small enough to work out by hand."""

import pytest
import torch

from clipcid_cli.algorithms.metrics.retrieval import retrieval_metrics


def test_two_captions_an_image() -> None:
    images = torch.eye(3)
    # Captions 0 and 1 belong to image 0, but the second is nearest to image 1; images 1 and 2 have one each.
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 0.1], [0.0, 0.2, 0.8]])
    metrics = retrieval_metrics(images, texts, torch.tensor([0, 0, 1, 2]), recall_at=(1, 2))
    assert metrics["image_retrieval_recall@1"] == pytest.approx(3 / 4)  # caption 1 finds image 1
    # For caption 1 the images 0 and 2 tie at 0, and image 0 comes first.
    assert metrics["image_retrieval_recall@2"] == 1.0
    assert metrics["text_retrieval_recall@1"] == pytest.approx(2 / 3)  # image 1 finds caption 1 of image 0 first
    assert metrics["text_retrieval_recall@2"] == 1.0


def test_ties_count_in_row_order() -> None:
    same = torch.ones(4, 1)
    metrics = retrieval_metrics(same, same, torch.arange(4), recall_at=(1, 3, 10))
    assert metrics == {
        "image_retrieval_recall@1": 0.25,
        "image_retrieval_recall@3": 0.75,
        "image_retrieval_recall@10": 1.0,
        "text_retrieval_recall@1": 0.25,
        "text_retrieval_recall@3": 0.75,
        "text_retrieval_recall@10": 1.0,
    }


def test_a_similarity_that_is_nan_is_not_found_however_few_the_candidates() -> None:
    images, texts = torch.eye(3), torch.eye(3)
    images[1] = torch.nan
    metrics = retrieval_metrics(images, texts, torch.arange(3), recall_at=(1, 2, 10))
    # Image 1 comes before the right one for captions 0 and 2: nothing says that it is less similar.
    assert metrics["image_retrieval_recall@1"] == 0
    assert metrics["image_retrieval_recall@10"] == metrics["text_retrieval_recall@10"] == pytest.approx(2 / 3)
    nothing = retrieval_metrics(torch.full((3, 3), torch.nan), texts, torch.arange(3), recall_at=(1, 5, 10))
    assert set(nothing.values()) == {0.0}


def test_image_without_caption_is_not_found() -> None:
    metrics = retrieval_metrics(torch.eye(2), torch.eye(2)[:1], torch.tensor([0]), recall_at=(1, 5))
    assert metrics["image_retrieval_recall@1"] == 1.0
    assert metrics["text_retrieval_recall@1"] == metrics["text_retrieval_recall@5"] == 0.5


@pytest.mark.parametrize(("images", "texts", "own"), [(0, 2, [0, 0]), (2, 0, []), (2, 2, [0, 2]), (2, 2, [-1, 0])])
def test_bad_input_is_refused(images: int, texts: int, own: list[int]) -> None:
    with pytest.raises(ValueError, match=r"retrieval needs|captions name"):
        retrieval_metrics(torch.zeros(images, 4), torch.zeros(texts, 4), torch.tensor(own, dtype=torch.int64))
