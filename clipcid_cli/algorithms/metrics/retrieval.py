"""Retrieval between images and their captions: recall at k in both directions, without the whole similarity matrix.

Shape letters: N images, M texts, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipcid_cli.algorithms.metrics.intervals import Array, draw_cells, interval, ratio

RECALL_AT = (1, 5, 10)
# Similarities held at once: 2^25 float32 are 128 MB, and three tensors of that shape live together.
_CHUNK_ENTRIES = 2**25


def retrieval_metrics(
    images_ND: torch.Tensor,
    texts_MD: torch.Tensor,
    image_of_text_M: torch.Tensor,
    recall_at: Sequence[int] = RECALL_AT,
    chunk_entries: int = _CHUNK_ENTRIES,
) -> dict[str, float]:
    """Measure how often a caption finds its image, and an image one of its captions, among the k most similar.

    Args:
        images_ND: Image embeddings, float [N, D], unit rows.
        texts_MD: Caption embeddings, float [M, D], unit rows.
        image_of_text_M: The image each caption belongs to, int64 [M] in [0, N). An image without a caption counts as
            not found.
        recall_at: The values of k; they may exceed the number of candidates.
        chunk_entries: Largest number of similarities held at once.

    Returns:
        ``image_retrieval_recall@k`` (mean over captions) and ``text_retrieval_recall@k`` (mean over images) for each
        k, in [0, 1].

    Raises:
        ValueError: when there is no image or no text, or a caption names no image.

    Source: LAION-AI/CLIP_benchmark 1.6.2, metrics/zeroshot_retrieval.py, names and definitions; equal similarities
        rank in row order here, where its ``torch.topk`` promises no order.
    """
    return recall_metrics(*retrieval_ranks(images_ND, texts_MD, image_of_text_M, chunk_entries), recall_at)


def recall_metrics(
    image_ranks_M: torch.Tensor, text_ranks_N: torch.Tensor, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Turn the ranks of `retrieval_ranks` into the metrics of `retrieval_metrics`."""
    metrics = {f"image_retrieval_recall@{k}": float((image_ranks_M < k).double().mean()) for k in recall_at}
    return metrics | {f"text_retrieval_recall@{k}": float((text_ranks_N < k).double().mean()) for k in recall_at}


def retrieval_ranks(
    images_ND: torch.Tensor,
    texts_MD: torch.Tensor,
    image_of_text_M: torch.Tensor,
    chunk_entries: int = _CHUNK_ENTRIES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the wrong answers ranked before the right one, in both directions; arguments and errors as `retrieval_metrics`.

    Returns:
        For each caption the images before its own, int64 [M]; for each image the captions before the first of its own,
        int64 [N]. The largest int64 where an image has no caption, or the similarity is NaN.
    """
    if not len(images_ND) or not len(texts_MD):
        raise ValueError(f"retrieval needs images and texts, not {len(images_ND)} and {len(texts_MD)}")
    if not 0 <= int(image_of_text_M.min()) <= int(image_of_text_M.max()) < len(images_ND):
        raise ValueError(f"captions name images up to {int(image_of_text_M.max())} of {len(images_ND)}")
    image_ranks_M = _image_ranks(images_ND, texts_MD, image_of_text_M, chunk_entries)
    return image_ranks_M, _text_ranks(images_ND, texts_MD, image_of_text_M, chunk_entries)


def _image_ranks(
    images_ND: torch.Tensor, texts_MD: torch.Tensor, image_of_text_M: torch.Tensor, chunk_entries: int
) -> torch.Tensor:
    """Count, for each text, the images before its own: int64 [M]."""
    columns_N = torch.arange(len(images_ND), device=images_ND.device)
    rows = max(1, chunk_entries // len(images_ND))
    ranks = []
    for start in range(0, len(texts_MD), rows):
        own_B = image_of_text_M[start : start + rows]
        scores_BN = texts_MD[start : start + rows] @ images_ND.T
        ranks.append(_count_before(scores_BN, scores_BN.gather(1, own_B[:, None]), own_B, columns_N))
    return torch.cat(ranks)


def _text_ranks(
    images_ND: torch.Tensor, texts_MD: torch.Tensor, image_of_text_M: torch.Tensor, chunk_entries: int
) -> torch.Tensor:
    """Count, for each image, the texts before the first of its own: int64 [N], the largest int64 where it has none."""
    num_texts = len(texts_MD)
    columns_M = torch.arange(num_texts, device=texts_MD.device)
    order_M = torch.argsort(image_of_text_M, stable=True)
    sorted_M = image_of_text_M[order_M]
    rows = max(1, chunk_entries // num_texts)
    ranks = []
    for start in range(0, len(images_ND), rows):
        scores_BM = images_ND[start : start + rows] @ texts_MD.T
        num_rows = len(scores_BM)
        # The captions of these images, as (row of the chunk, column) pairs sorted by row and then by column.
        bounds = torch.tensor([start, start + num_rows], device=sorted_M.device)
        low, high = torch.searchsorted(sorted_M, bounds).tolist()
        row_P, column_P = sorted_M[low:high] - start, order_M[low:high]
        own_P = scores_BM[row_P, column_P]
        best_B = scores_BM.new_full((num_rows,), -torch.inf).scatter_reduce(0, row_P, own_P, "amax")
        is_best_P = own_P == best_B[row_P]
        first_B = torch.full((num_rows,), num_texts, device=row_P.device)
        first_B = first_B.scatter_reduce(0, row_P[is_best_P], column_P[is_best_P], "amin")
        before_B = _count_before(scores_BM, best_B[:, None], first_B, columns_M)
        ranks.append(before_B.masked_fill(best_B == -torch.inf, torch.iinfo(torch.int64).max))
    return torch.cat(ranks)


def _count_before(
    scores_BM: torch.Tensor, own_B1: torch.Tensor, column_B: torch.Tensor, columns_M: torch.Tensor
) -> torch.Tensor:
    """Count the entries of each row that are not lower than its own one, without equal ones in the same or a later column.

    The largest int64 where its own is NaN: what cannot be compared is never found, however few the candidates are.
    """
    after_BM = (scores_BM < own_B1) | ((scores_BM == own_B1) & (columns_M >= column_B[:, None]))
    return (~after_BM).sum(dim=1).masked_fill(own_B1.squeeze(1).isnan(), torch.iinfo(torch.int64).max)


def retrieval_intervals(
    image_ranks_M: torch.Tensor, text_ranks_N: torch.Tensor, captions_N: torch.Tensor, replicates: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return the 95 % bootstrap interval of each of `recall_metrics`.

    Images are drawn, each with all its captions: captions of one image are not independent.

    Args:
        image_ranks_M: As `retrieval_ranks` returns them, captions in order of their images.
        captions_N: Number of captions of each image, int64 [N].
        replicates: Number of draws.
    """
    cells, draws = draw_cells(count_hits(image_ranks_M, text_ranks_N, captions_N), replicates, seed)
    count = len(RECALL_AT)
    found = {
        f"image_retrieval_recall@{k}": interval(ratio(draws, cells[:, 1 + place], cells[:, 0]))
        for place, k in enumerate(RECALL_AT)
    }
    return found | {
        f"text_retrieval_recall@{k}": interval(ratio(draws, cells[:, 1 + count + place]))
        for place, k in enumerate(RECALL_AT)
    }


def count_hits(image_ranks_M: torch.Tensor, text_ranks_N: torch.Tensor, captions_N: torch.Tensor) -> Array:
    """Count for each image its captions, how many of them find it, and whether it finds one, at each of `RECALL_AT`.

    Arguments are `retrieval_intervals`'.

    Returns:
        int64 [N, 1 + K + K].
    """
    owner_M = torch.repeat_interleave(torch.arange(len(captions_N)), captions_N)
    found = [
        torch.zeros(len(captions_N), dtype=torch.int64).index_add_(0, owner_M, (image_ranks_M < k).long())
        for k in RECALL_AT
    ]
    return torch.stack([captions_N, *found, *((text_ranks_N < k).long() for k in RECALL_AT)], dim=1).numpy()
