"""Which images a linear probe is fitted and validated on: a validation split, and a few images of every class.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import torch


def stratum(labels: torch.Tensor) -> torch.Tensor:
    """Return the class by which each image is stratified: its own or, of several, the rarest.

    Args:
        labels: Classes, int64 [N], or whether an image has a class, bool [N, C].

    Returns:
        int64 [N]; −1 for an image without a class.
    """
    if labels.ndim == 1:
        return labels
    images_C = labels.sum(dim=0)
    own_NC = torch.where(labels, images_C, len(labels) + 1)
    return torch.where(labels.any(dim=1), own_NC.argmin(dim=1), -1)


def split_by_class(labels: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """Choose validation images, the same share of every class.

    Args:
        labels: Classes, int64 [N], or whether an image has a class, bool [N, C], which is split by `stratum`.
        fraction: Share of each class, rounded; every class with at least two images keeps one on either side.

    Returns:
        Which images are for validation, bool [N]; a function of the arguments only.
    """
    generator = torch.Generator().manual_seed(seed)
    labels_N = stratum(labels.cpu())
    chosen_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in sorted(set(labels_N.tolist())):
        members = (labels_N == label).nonzero()[:, 0]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen_N[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen_N


def draw_shots(labels: torch.Tensor, shots: int, seed: int) -> torch.Tensor:
    """Draw the same number of images of every class; where images have several classes, the union of such draws.

    Draws of one seed are nested: those of fewer shots are part of those of more.

    Args:
        labels: Classes, int64 [N], or whether an image has a class, bool [N, C].
        shots: Images of each class; of a class with fewer, all are drawn.

    Returns:
        Indices of the images drawn, ascending, int64; a function of the arguments only.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    classes = sorted(set(labels.tolist())) if labels.ndim == 1 else range(labels.shape[1])
    drawn_N = torch.zeros(len(labels), dtype=torch.bool)
    for label in classes:
        members = (labels == label if labels.ndim == 1 else labels[:, label]).nonzero()[:, 0]
        drawn_N[members[torch.randperm(len(members), generator=generator)[:shots]]] = True
    return drawn_N.nonzero()[:, 0]
