"""Recall at k: the plain definition over the whole similarity matrix, in any chunks, and with values that are NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.metrics import retrieval
from clipcid_cli.algorithms.metrics.retrieval import RECALL_AT, retrieval_metrics

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
    metrics = retrieval_metrics(images, texts, own)
    for k in RECALL_AT:
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(float((image_ranks < k).double().mean()))
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(float((text_ranks < k).double().mean()))


def test_a_similarity_that_is_nan_is_not_found_however_few_the_candidates() -> None:
    images, texts = torch.eye(3), torch.eye(3)
    images[1] = torch.nan
    image_ranks, text_ranks = retrieval.retrieval_ranks(images, texts, torch.arange(3))
    # Image 1 comes before the right one for captions 0 and 2: nothing says that it is less similar.
    assert (image_ranks.tolist(), text_ranks.tolist()) == ([1, NEVER, 1], [0, NEVER, 0])
    nothing = retrieval_metrics(torch.full((3, 3), torch.nan), texts, torch.arange(3))
    assert set(nothing.values()) == {0.0}
