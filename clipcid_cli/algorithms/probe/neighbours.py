"""Weighted k-nearest-neighbour classification on frozen features, exact.

Features are unit rows in float32, rounded to multiples of 2⁻²⁴, which moves no entry by more than 2⁻²⁵: then cosines have
the same bits in any block and on any device, and are equal exactly where the rounded rows say so
(:mod:`clipcid_cli.algorithms.near.nearest`). Of equal ones the smaller row number comes first.

Source: the protocol of DINO (Caron et al. 2021, §4.1; Wu et al. 2018, §3.4); float64 grid and ties [O].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clipcid_cli.algorithms.near.exact import round_to_grid
from clipcid_cli.algorithms.near.nearest import top_nearest

TEMPERATURE = 0.07
# Images compared at once.
_IMAGES = {"cpu": 1024, "cuda": 4096}
# Entries of the scores of a block of images.
_SCORES = 2**22


def nearest_neighbours(
    images_ND: torch.Tensor, training_MD: torch.Tensor, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Find the training images most similar to each image, unit rows in float32.

    Yields:
        For block after block of images the cosines, float64 [B, k], descending, and the row numbers, int64 [B, k], both on
        the CPU.
    """
    training_MD = round_to_grid(training_MD)
    for images_BD in torch.split(images_ND, _IMAGES[images_ND.device.type]):
        number_Bk, cosine_Bk = top_nearest(round_to_grid(images_BD), training_MD, k, all_exact=True)
        yield cosine_Bk.cpu(), number_Bk.cpu()


def vote(
    cosine_Nk: torch.Tensor, number_Nk: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> Iterator[torch.Tensor]:
    """Score classes by the votes of an image's neighbours, each of weight exp(cosine / 0.07).

    Args:
        labels: Classes of the training images, int64 [M], or whether one has a class, bool [M, C].

    Yields:
        For block after block of images the share of the weight of all neighbours that is of the class, float64 [B, C] in
        (0, 1]; −∞ where no neighbour is. With one class an image, they are scikit-learn's ``predict_proba``.
    """
    at_once = max(1, _SCORES // num_classes)
    for cosine_Bk, number_Bk in zip(torch.split(cosine_Nk, at_once), torch.split(number_Nk, at_once), strict=True):
        weight_Bk = (cosine_Bk / TEMPERATURE).exp()
        votes_BC = weight_Bk.new_zeros(len(weight_Bk), num_classes)
        # One neighbour after another, so that the order of the sum is fixed.
        for weight_B, number_B in zip(weight_Bk.unbind(dim=1), number_Bk.unbind(dim=1), strict=True):
            own = labels[number_B]
            if own.ndim == 2:
                votes_BC += weight_B[:, None] * own
            else:
                votes_BC.scatter_add_(1, own[:, None], weight_B[:, None])
        yield torch.where(votes_BC > 0, votes_BC / weight_Bk.sum(dim=1, keepdim=True), -torch.inf)
