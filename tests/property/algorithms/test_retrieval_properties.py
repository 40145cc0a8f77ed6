"""Recall at k: chunking never changes it, and it equals the plain definition over the whole similarity matrix."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.metrics.retrieval import retrieval_metrics


def plain_recall(images: torch.Tensor, texts: torch.Tensor, own: torch.Tensor, k: int) -> tuple[float, float]:
    scores = texts @ images.T
    by_image = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    by_text = torch.sort(scores.T, dim=1, descending=True, stable=True).indices[:, :k]
    image_found = (by_image == own[:, None]).any(dim=1)
    text_found = (own[by_text] == torch.arange(len(images))[:, None]).any(dim=1)
    return float(image_found.double().mean()), float(text_found.double().mean())


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

    metrics = retrieval_metrics(images, texts, own, recall_at=(1, 2, 5), chunk_entries=chunk_entries)

    for k in (1, 2, 5):
        by_image, by_text = plain_recall(images, texts, own, k)
        assert metrics[f"image_retrieval_recall@{k}"] == by_image
        assert metrics[f"text_retrieval_recall@{k}"] == by_text
