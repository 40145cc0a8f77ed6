"""Weighted k-nearest-neighbour classification on frozen features, exact.

Shape letters: N images, M training images, D width, C classes, k neighbours, B images and m training images of a block.

Features are unit rows in float32. Their entries are rounded to multiples of 2⁻²⁶, which moves none by more than 2⁻²⁷: then
a product of two entries is a multiple of 2⁻⁵², and the partial sums of a dot product stay below 2 by Cauchy–Schwarz.
Multiples of 2⁻⁵² below 2 are float64 numbers, so no sum is ever rounded: a cosine has the same bits in any block and on
any device, and cosines are equal exactly where the rounded rows say so. Of equal ones the smaller row number comes first.

Source: the protocol of DINO (Caron et al. 2021, §4.1; Wu et al. 2018, §3.4); float64 grid and ties [O].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

TEMPERATURE = 0.07
_GRID = 2.0**26
# Images compared at once, and training images: float64 cosines of 32 MiB on a CPU and 256 MiB on a GPU, of which the search
# holds up to four copies.
_BLOCK = {"cpu": (1024, 4096), "cuda": (4096, 8192)}
# Entries of the scores of a block of images.
_SCORES = 2**22


def nearest_neighbours(
    images_ND: torch.Tensor, training_MD: torch.Tensor, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Find the training images most similar to each image.

    Args:
        images_ND: Unit rows, float32 [N, D].
        training_MD: Unit rows, float32 [M, D], on the same device.
        k: Neighbours of each image, in [1, M].

    Yields:
        For block after block of images the cosines, float64 [B, k], descending, and the row numbers, int64 [B, k], both on
        the CPU.

    Raises:
        ValueError: when widths differ, or `k` is outside [1, M].

    Cost: N · M · D multiplications in float64; memory for one block, whatever N and M.
    """
    if images_ND.shape[1] != training_MD.shape[1]:
        raise ValueError(f"images are {images_ND.shape[1]} wide, training images {training_MD.shape[1]}")
    if not 1 <= k <= len(training_MD):
        raise ValueError(f"k must lie in [1, {len(training_MD)}], not {k}")
    images_at_once, training_at_once = _BLOCK[images_ND.device.type]
    for images in torch.split(images_ND, images_at_once):
        exact_BD, first = _on_grid(images), 0
        cosine_Bk = exact_BD.new_empty(len(images), 0)
        number_Bk = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
        for training in torch.split(training_MD, training_at_once):
            new_Bk, place_Bk = _largest(exact_BD @ _on_grid(training).T, k)
            # All numbers found before are smaller, and come first.
            cosine_Bk, chosen_Bk = _largest(torch.cat([cosine_Bk, new_Bk], dim=1), k)
            number_Bk = torch.cat([number_Bk, place_Bk + first], dim=1).gather(1, chosen_Bk)
            first += len(training)
        yield cosine_Bk.cpu(), number_Bk.cpu()


def vote(
    cosine_Nk: torch.Tensor, number_Nk: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> Iterator[torch.Tensor]:
    """Score classes by the votes of an image's neighbours, each of weight exp(cosine / 0.07).

    Args:
        cosine_Nk: As :func:`nearest_neighbours` returns them, float64 [N, k], k ≥ 1.
        number_Nk: Likewise, int64 [N, k].
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


def _on_grid(rows: torch.Tensor) -> torch.Tensor:
    """Round to multiples of 2⁻²⁶, as float64."""
    return (rows.double() * _GRID).round() / _GRID


def _largest(values_Bm: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `k` largest values of each row (all, where there are fewer), descending, and their places, int64.

    Of equal values the one at the smaller place comes first, which ``topk`` alone does not promise.
    """
    if values_Bm.shape[1] <= k:
        return values_Bm.sort(dim=1, descending=True, stable=True)
    top_Bk1, place_Bk1 = values_Bm.topk(k + 1, dim=1)
    place_Bk = place_Bk1[:, :k].sort(dim=1).values
    value_Bk, order_Bk = values_Bm.gather(1, place_Bk).sort(dim=1, descending=True, stable=True)
    place_Bk = place_Bk.gather(1, order_Bk)
    # Where the last is equal to one left out, topk may have taken any of them.
    open_B = (top_Bk1[:, k - 1] == top_Bk1[:, k]).nonzero()[:, 0]
    if len(open_B):
        value_Bm, sorted_Bm = values_Bm[open_B].sort(dim=1, descending=True, stable=True)
        value_Bk[open_B], place_Bk[open_B] = value_Bm[:, :k], sorted_Bm[:, :k]
    return value_Bk, place_Bk
