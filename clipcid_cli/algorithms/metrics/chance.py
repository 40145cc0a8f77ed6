"""What a guess scores: values of metrics that no model had to earn.

Shape letters: N images, M captions, C classes.
"""

from __future__ import annotations

import math

import numpy as np

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K
from clipcid_cli.algorithms.metrics.intervals import Array
from clipcid_cli.algorithms.metrics.retrieval import RECALL_AT, retrieval_name


def guess_classes(num_classes: int) -> dict[str, float]:
    """Return what classes guessed at random score, each as likely as the others, by the names of `accuracy_metrics`."""
    chance = {"acc1": 1 / num_classes}
    if num_classes >= ACCURACY_TOP_K:
        chance["acc5"] = ACCURACY_TOP_K / num_classes
    return chance | {"mean_per_class_recall": 1 / num_classes}


def largest_class(labels_N: Array) -> float:
    """Return the share of the images in the most frequent class: the ``acc1`` of predicting it for all."""
    return float(np.bincount(labels_N).max() / len(labels_N))


def guess_order(positive_NC: Array) -> dict[str, float]:
    """Return what a random order of the images scores: about the share of each class, averaged over those with images."""
    shares_C = positive_NC.mean(axis=0)
    return {"mean_average_precision": float(shares_C[shares_C > 0].mean())}


def guess_captions(captions_N: Array) -> dict[str, float]:
    """Return what a random order scores by the names of `retrieval_metrics`; `captions_N` counts each image's captions."""
    num_images, num_captions = len(captions_N), int(captions_N.sum())
    own_counts, images = np.unique(captions_N, return_counts=True)
    texts = dict[str, float]()
    for k in RECALL_AT:
        drawn = min(k, num_captions)
        draws = math.comb(num_captions, drawn)
        hits = 0  # draws with a caption of the image, summed over the images; whole numbers, so that nothing is rounded
        for own, count in zip(own_counts.tolist(), images.tolist(), strict=True):
            hits += count * (draws - math.comb(num_captions - own, drawn))
        texts[retrieval_name("text", f"recall@{k}")] = hits / (num_images * draws)
    return guess_own("image", num_images) | texts


def guess_own(sought: str, count: int) -> dict[str, float]:
    """Return what a random order of so many candidates scores, of which one is right, by the names of `score_ranks`."""
    return {retrieval_name(sought, f"recall@{k}"): min(1.0, k / count) for k in RECALL_AT}
