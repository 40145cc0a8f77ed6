"""The repair of a teacher: a linear map of its image rows, after which they meet the text rows.

A teacher's images may be good and their pairing with texts poor. Losses that compare a student with the teacher then teach
that pairing. The repair is fitted to pairs, from the identity on. How many steps of that are best, and whether the repair is
better than none, is told by pairs whose captions it has not seen: captions are dealt to five folds, and each fold judges a
repair that was fitted to the others.

It is judged by the **log-rank**, from caption to image: the mean of ln(1 + number of images of other captions nearer to the
caption than the pair's own). Other measures follow noise: the loss it is fitted by falls for a mere change of sharpness, and
the rank of captions by an image for what all images have in common, such as which captions are frequent. Pairs of one
caption rise and fall together, so the standard error is that of captions where it is the larger.

Shape letters: N pairs, D width, C different captions.

Source: ours, docs/method.md#repair-of-the-teacher.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.contrastive import contrast_both_ways
from clipcid_cli.algorithms.pairing import Pairing

MAX_PAIRS = 10_000
"""Pairs that are enough for any data; judging costs the square of their number."""
# With fewer pairs, or different captions, nothing can be told.
_MIN_PAIRS = 250
_MIN_CAPTIONS = 4
_FOLDS = 5

_BATCH = 512
_LEARNING_RATE = 1e-3
_MAX_STEPS = 150
_JUDGED_EVERY = 5
_STOP_AFTER = 25
# A gain of at least so many standard errors is taken.
_CLEAR = 3.0
# Entries of the map are multiples of this.
_GRID = 2.0**-16


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Image and text rows of pairs, unit rows, float32 [N, D]; captions are numbered, int64 [N], equal ones alike."""

    images_ND: Tensor
    texts_ND: Tensor
    captions_N: Tensor

    def __len__(self) -> int:
        return len(self.captions_N)

    def take(self, places: Tensor) -> Pairs:
        return Pairs(self.images_ND[places], self.texts_ND[places], self.captions_N[places])


@dataclasses.dataclass(frozen=True)
class Repair:
    """What was found."""

    # The map A, float32 [D, D]; None where it does not help clearly, and the rows stay as they are. Entries are
    # multiples of 2⁻¹⁶: products of float16 rows and A, added in float64, are exact in any order.
    map_DD: Tensor | None
    pairs: int  # pairs that were read
    captions: int  # different captions of those
    steps: int  # steps of the fit after which it was best; 0 for none
    log_rank: tuple[float, float]  # mean log-rank of the pairs, before and after
    standard_error: float  # of the difference of the two
    # Share of the images whose own caption is the nearest of those of its fold, before and after.
    recall_at_1: tuple[float, float]
    pairing: Pairing  # of the captions of a fold and its images, after the best number of steps


def are_enough(pairs: Pairs) -> bool:
    """Tell whether a repair can be judged by these pairs."""
    return len(pairs) >= _MIN_PAIRS and len(np.unique(pairs.captions_N)) >= _MIN_CAPTIONS


def fit_repair(pairs: Pairs, scale: float, seed: int) -> Repair:
    """Fit A, from the identity on, to min CE(norm(tA) ↔ u; scale), and judge it.

    The bytes depend on the arguments, PyTorch and the kind of processor, and on the number of its threads: call it with one.

    Args:
        pairs: Enough of them, see `are_enough`.
        scale: The teacher's logit scale (not its logarithm).
    """
    fold_N = deal_captions(pairs.captions_N, seed)
    folds = np.unique(fold_N)  # a caption of many pairs leaves folds between without any
    fits = [_Fit(pairs.take(fold_N != fold), scale, seed) for fold in folds]
    judges = [_Judge(pairs.take(fold_N == fold)) for fold in folds]
    captions = torch.cat([judge.captions_N for judge in judges])

    def judge() -> tuple[Tensor, float]:
        found = [judge(fit.map_DD.detach()) for judge, fit in zip(judges, fits, strict=True)]
        nearer_N = torch.cat([nearer for nearer, _ in found])
        return nearer_N, sum(nearest for _, nearest in found) / len(pairs)

    best_nearer_N, recall = judge()
    before_N = best_N = best_nearer_N.double().log1p()
    recall_before = recall
    best_step = 0
    for step in range(1, _MAX_STEPS + 1):
        for fit in fits:
            fit.step()
        if step % _JUDGED_EVERY == 0:
            nearer_N, found_recall = judge()
            found_N = nearer_N.double().log1p()
            if found_N.mean() < best_N.mean():
                best_step, best_N, recall = step, found_N, found_recall
                best_nearer_N = nearer_N
            if step - best_step >= _STOP_AFTER:
                break
    gain_N = before_N - best_N
    error = standard_error(gain_N, captions)
    map_DD = None
    if best_step and float(gain_N.mean()) >= _CLEAR * error:
        whole = _Fit(pairs, scale, seed)
        for _ in range(best_step):
            whole.step()
        map_DD = (whole.map_DD.detach() / _GRID).round() * _GRID
    return Repair(
        map_DD=map_DD,
        pairs=len(pairs),
        captions=len(np.unique(captions)),
        steps=best_step,
        log_rank=(float(before_N.mean()), float(best_N.mean())),
        standard_error=error,
        recall_at_1=(recall_before, recall),
        pairing=Pairing.of(best_nearer_N.numpy(), torch.cat([judge.others_N for judge in judges]).numpy()),
    )


def guess_at_1(captions: int) -> float:
    """Return the recall at 1 of a guess where there are so many different captions: of the pairs of a fold only."""
    return _count_folds(captions) / captions


def _count_folds(captions: int) -> int:
    return min(_FOLDS, captions // 2)


def deal_captions(captions_N: Tensor, seed: int) -> Tensor:
    """Deal different captions, four at least, to folds of about as many pairs; return the fold of each pair, int64 [N]."""
    captions, number_N, counts = np.unique(captions_N, return_inverse=True, return_counts=True)
    num_folds = _count_folds(len(captions))
    order = np.random.default_rng(seed).permutation(len(captions))
    middles = np.cumsum(counts[order]) - counts[order] / 2
    fold_C = np.empty(len(captions), dtype=np.int64)
    fold_C[order] = middles * num_folds // len(number_N)
    return torch.from_numpy(fold_C[number_N])


class _Fit:
    """A repair in the making."""

    def __init__(self, pairs: Pairs, scale: float, seed: int) -> None:
        width = pairs.images_ND.shape[1]
        self.map_DD = torch.eye(width, requires_grad=True)
        self._scale = torch.tensor(scale)
        self._optimiser = torch.optim.Adam([self.map_DD], lr=_LEARNING_RATE)
        self._batches = _draw_batches(pairs, seed)

    def step(self) -> None:
        batch = next(self._batches)
        moved = F.normalize(batch.images_ND @ self.map_DD, dim=1)
        total = contrast_both_ways(moved, batch.texts_ND, self._scale)
        self._optimiser.zero_grad()
        (total / (2 * len(batch))).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._optimiser.step()


def _draw_batches(pairs: Pairs, seed: int) -> Iterator[Pairs]:
    """Yield batches of the pairs without end, in a new order for each pass."""
    generator = torch.Generator().manual_seed(seed)
    size = min(_BATCH, len(pairs))
    while True:
        order = torch.randperm(len(pairs), generator=generator)
        for start in range(0, len(pairs) - size + 1, size):
            yield pairs.take(order[start : start + size])


class _Judge:
    """Tells how well the captions of a fold find their images, and images their captions."""

    def __init__(self, pairs: Pairs) -> None:
        _, firsts, numbers = np.unique(pairs.captions_N, return_index=True, return_inverse=True)
        self.captions_N, self._number_N = pairs.captions_N, torch.from_numpy(numbers)
        self._images_ND, self._texts_CD = pairs.images_ND, pairs.texts_ND[torch.from_numpy(firsts)]
        self._is_other_NN = self._number_N[:, None] != self._number_N
        self.others_N = self._is_other_NN.sum(dim=1)  # images of other captions

    def __call__(self, map_DD: Tensor) -> tuple[Tensor, int]:
        """Return how many images of other captions are nearer to each caption than its own, with this map, int64 [N].

        And how many images are nearest to their own caption.
        """
        cosines_CN = self._texts_CD @ F.normalize(self._images_ND @ map_DD, dim=1).T
        cosines_NN = cosines_CN[self._number_N]
        nearer_N = ((cosines_NN > cosines_NN.diagonal()[:, None]) & self._is_other_NN).sum(dim=1)
        return nearer_N, int((cosines_CN.argmax(dim=0) == self._number_N).sum())


def standard_error(values_N: Tensor, captions_N: Tensor) -> float:
    """Return that of the mean of some values, float64: the larger of what single pairs and what whole captions give."""
    _, number_N = np.unique(captions_N, return_inverse=True)
    of_captions_C = np.bincount(number_N, weights=values_N - values_N.mean())
    total = len(of_captions_C)
    by_pairs = float(values_N.std()) / math.sqrt(len(values_N))
    by_captions = math.sqrt(float((of_captions_C**2).sum()) * total / (total - 1)) / len(values_N)
    return max(by_pairs, by_captions)
