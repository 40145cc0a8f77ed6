"""Retrieval: chunking never changes a rank, and it equals the plain definition over the whole similarity matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.metrics import retrieval


@given(
    seed=st.integers(0, 2**31),
    num_images=st.integers(1, 12),
    num_texts=st.integers(1, 20),
    chunk_entries=st.integers(1, 300),
)
@settings(max_examples=60)
def test_chunked_equals_plain(seed: int, num_images: int, num_texts: int, chunk_entries: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Small integers: products are exact in any order of summation, and ties are common.
    images = torch.randint(-1, 2, (num_images, 3), generator=generator).float()
    texts = torch.randint(-1, 2, (num_texts, 3), generator=generator).float()
    own = torch.randint(0, num_images, (num_texts,), generator=generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_CHUNK_ENTRIES", chunk_entries)
        image_ranks, text_ranks = retrieval.retrieval_ranks(images, texts, own)

    by_image = torch.sort(texts @ images.T, dim=1, descending=True, stable=True).indices
    assert image_ranks.tolist() == [
        row.index(image) for row, image in zip(by_image.tolist(), own.tolist(), strict=True)
    ]
    by_text = torch.sort(images @ texts.T, dim=1, descending=True, stable=True).indices
    for image, rank in enumerate(text_ranks.tolist()):
        found = (own[by_text[image]] == image).nonzero()
        assert rank == (int(found[0]) if len(found) else torch.iinfo(torch.int64).max)
