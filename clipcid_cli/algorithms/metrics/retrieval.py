"""Retrieval between images and their captions, in both directions, without the whole similarity matrix.

Shape letters beside those of the map: U cells of :mod:`.intervals`; Q queries, R candidates and P pairs of them that belong
together; B queries and p pairs of a chunk; S seeds; K measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.intervals import (
    Array,
    CellMetrics,
    PairedMetric,
    compare,
    find_cells,
    mcnemar,
    ratio,
)

RECALL_AT = (1, 5, 10)


def _is_within(k: int, ranks_Q: torch.Tensor) -> torch.Tensor:
    return ranks_Q < k


# By the name of a measure what a query scores, in [0, 1], by the wrong answers before the first right one, int64 [Q];
# the largest int64: it is never found.
MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {f"recall@{k}": partial(_is_within, k) for k in RECALL_AT}


def retrieval_name(sought: str, measure: str) -> str:
    """Return CLIP_benchmark's name of a metric: a measure of the search for an ``image`` or a ``text``."""
    return f"{sought}_retrieval_{measure}"


RETRIEVAL_METRICS = tuple(retrieval_name(sought, measure) for sought in ("image", "text") for measure in MEASURES)

# Similarities held at once: 2^25 float32 are 128 MB, and three tensors of that shape live together.
_CHUNK_ENTRIES = 2**25

# For each caption the images before its own, int64 [M]; for each image the captions before the first of its own, int64 [N].
Ranks = tuple[torch.Tensor, torch.Tensor]


def retrieval_ranks(images_ND: torch.Tensor, texts_MD: torch.Tensor, image_of_text_M: torch.Tensor) -> Ranks:
    """Count the wrong answers ranked before the right one, in both directions; equal similarities rank in row order.

    Args:
        image_of_text_M: The image each caption belongs to; rows are of length 1, N and M at least 1.

    Returns:
        The ranks; the largest int64 where an image has no caption, or the similarity is NaN.
    """
    texts_M = torch.arange(len(texts_MD), device=texts_MD.device)
    return (
        _rank_own(texts_MD, images_ND, texts_M, image_of_text_M),
        _rank_own(images_ND, texts_MD, image_of_text_M, texts_M),
    )


def _rank_own(
    queries_QD: torch.Tensor, candidates_RD: torch.Tensor, query_P: torch.Tensor, candidate_P: torch.Tensor
) -> torch.Tensor:
    """Count, for each query, the candidates before the first of its own: int64 [Q]."""
    candidates_R = torch.arange(len(candidates_RD), device=candidates_RD.device)
    at_once = max(1, _CHUNK_ENTRIES // len(candidates_RD))
    ranks = []
    for start in range(0, len(queries_QD), at_once):
        scores_BR = queries_QD[start : start + at_once] @ candidates_RD.T
        in_chunk_P = (query_P >= start) & (query_P < start + len(scores_BR))
        row_p, column_p = query_P[in_chunk_P] - start, candidate_P[in_chunk_P]
        own_p = scores_BR[row_p, column_p]
        best_B = scores_BR.new_full((len(scores_BR),), -torch.inf).scatter_reduce(0, row_p, own_p, "amax")
        is_best_p = own_p == best_B[row_p]
        first_B = torch.full_like(best_B, len(candidates_RD), dtype=torch.int64)
        first_B = first_B.scatter_reduce(0, row_p[is_best_p], column_p[is_best_p], "amin")
        best_B1 = best_B[:, None]
        after_BR = (scores_BR < best_B1) | ((scores_BR == best_B1) & (candidates_R >= first_B[:, None]))
        # What has no own candidate, or cannot be compared with it, is never found, however few the candidates are.
        lost_B = ~(best_B > -torch.inf)
        ranks.append((~after_BR).sum(dim=1).masked_fill(lost_B, torch.iinfo(torch.int64).max))
    return torch.cat(ranks)


def score_ranks(sought: str, ranks_Q: torch.Tensor) -> dict[str, float]:
    """Return the mean of each measure over queries, by its name."""
    return {
        retrieval_name(sought, measure): float(score(ranks_Q).double().mean()) for measure, score in MEASURES.items()
    }


def retrieval_metrics(ranks: Ranks, image_of_text_M: torch.Tensor) -> CellMetrics:
    """Measure how well a caption finds its image, and an image one of its captions.

    Images are drawn, each with all its captions: captions of one image are not independent.

    Returns:
        `RETRIEVAL_METRICS`, in [0, 1]: ``image_retrieval_recall@k``, the share of the captions whose image is among the k
        most similar ones, and ``text_retrieval_recall@k``, the share of the images of which one caption is.

    Source: LAION-AI/CLIP_benchmark 1.6.2, metrics/zeroshot_retrieval.py, names and definitions; equal similarities
        rank in row order here, where its ``torch.topk`` promises no order.
    """
    cells_UV, cells_N = find_cells(_sum_scores(ranks, image_of_text_M))
    return CellMetrics(cells_N, partial(_mean_scores, cells_UV))


def compare_retrieval(
    first_S: Sequence[Ranks],
    second_S: Sequence[Ranks],
    image_of_text_M: torch.Tensor,
    replicates: int,
    seed: int,
    groups_N: Array | None = None,
) -> dict[str, PairedMetric]:
    """Compare `retrieval_metrics` of two models, or of seeds of each; groups as for `compare`.

    McNemar's test is of images alone, since captions are not independent, and of recalls, which are right or wrong.
    """
    scores = [_sum_scores(ranks, image_of_text_M) for ranks in (*first_S, *second_S)]
    cells_UW, cells_N = find_cells(np.concatenate(scores, axis=1))
    models = [CellMetrics(cells_N, partial(_mean_scores, cells_UV)) for cells_UV in np.hsplit(cells_UW, len(scores))]
    num_seeds = len(first_S)
    p_values = None
    if num_seeds == 1:
        (_, first_N), (_, second_N) = first_S[0], second_S[0]
        p_values = {
            retrieval_name("text", f"recall@{k}"): mcnemar((first_N < k).numpy(), (second_N < k).numpy())
            for k in RECALL_AT
        }
    return compare(models[:num_seeds], models[num_seeds:], replicates, seed, p_values, groups_N)


def _sum_scores(ranks: Ranks, image_of_text_M: torch.Tensor) -> Array:
    """Return each image's number of captions, the sums of their scores, and its own: float64 [N, V = 1 + K + K]."""
    image_ranks_M, text_ranks_N = ranks
    num_images = len(text_ranks_N)
    captions_N = torch.bincount(image_of_text_M, minlength=num_images).double()
    of_captions = [
        torch.bincount(image_of_text_M, score(image_ranks_M).double(), num_images) for score in MEASURES.values()
    ]
    of_images = [score(text_ranks_N).double() for score in MEASURES.values()]
    return torch.stack([captions_N, *of_captions, *of_images], dim=1).numpy()


def _mean_scores(cells_UV: Array, draws_BU: Array) -> dict[str, Array]:
    captions_U, *sums = cells_UV.T
    of_captions = [ratio(draws_BU, sums_U, captions_U) for sums_U in sums[: len(MEASURES)]]
    of_images = [ratio(draws_BU, sums_U) for sums_U in sums[len(MEASURES) :]]
    return dict(zip(RETRIEVAL_METRICS, of_captions + of_images, strict=True))
