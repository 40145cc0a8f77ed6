"""The repair of a teacher: a linear map of its image rows, after which they meet the text rows.

A teacher's images may be good and their pairing with texts poor. Losses that compare a student with its rows, or with its
other tower, then teach that pairing. The repair is fitted to pairs, from the identity on, and chosen and accepted by others,
whose captions it has not seen.

What it is judged by is the **log-rank**, from caption to image: the mean of ln(1 + number of images of other captions nearer
to the caption than the pair's own). Other measures follow noise: the loss it is fitted by falls for a mere change of
sharpness, and the rank of captions by an image for what all images have in common, such as which captions are frequent.
Pairs of one caption rise and fall together, so the standard error counts captions where these are fewer.

Shape letters: N pairs, B pairs of a step, D width, C different captions.

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

# The pairs of which captions are held out, and the most of them; the most that are fitted to.
_HELD_OUT = 0.2
_MAX_HELD_OUT = 4_096
_MAX_FITTED = 32_768
MAX_PAIRS = _MAX_FITTED + _MAX_HELD_OUT
"""Pairs that are enough for any data."""
# With fewer held-out pairs, or fewer different captions of them, nothing can be told.
_MIN_HELD_OUT = 64
_MIN_CAPTIONS = 2

_BATCH = 512
_LEARNING_RATE = 1e-3
_MAX_STEPS = 150
_JUDGED_EVERY = 5
_PATIENCE = 25
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
        """Return the pairs at some places."""
        return Pairs(self.images_ND[places], self.texts_ND[places], self.captions_N[places])


@dataclasses.dataclass(frozen=True)
class Repair:
    """What was found.

    Attributes:
        map_DD: The map A, float32 [D, D]; None where it does not help clearly, and the rows stay as they are. Entries are
            multiples of 2⁻¹⁶: products of float16 rows and A, added in float64, are exact in any order.
        fitted: Pairs that it was fitted to.
        held_out: Pairs by which it was chosen and accepted.
        captions: Different captions of those.
        steps: Steps after which it was best; 0 for none.
        log_rank: Mean log-rank of the held-out pairs, before and after.
        standard_error: Of the difference of the two.
        recall_at_1: Share of the held-out pairs of which no image of another caption is nearer to the caption.
    """

    map_DD: Tensor | None
    fitted: int
    held_out: int
    captions: int
    steps: int
    log_rank: tuple[float, float]
    standard_error: float
    recall_at_1: tuple[float, float]


def split_by_caption(pairs: Pairs, seed: int) -> tuple[Pairs, Pairs] | None:
    """Divide pairs into those to fit to and those held out, which have no caption in common; None where they are too few."""
    captions, number_N, counts = np.unique(pairs.captions_N.numpy(), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(captions))
    wanted = min(_MAX_HELD_OUT, _HELD_OUT * len(pairs))
    num_held_out = 1 + int(np.searchsorted(np.cumsum(counts[order]), wanted))
    is_held_out = np.isin(number_N, order[:num_held_out])
    held_out = np.flatnonzero(is_held_out)[:_MAX_HELD_OUT]
    fitted = np.flatnonzero(~is_held_out)[:_MAX_FITTED]
    if num_held_out < _MIN_CAPTIONS or min(len(held_out), len(fitted)) < _MIN_HELD_OUT:
        return None
    return pairs.take(torch.from_numpy(fitted)), pairs.take(torch.from_numpy(held_out))


def fit_repair(fitted: Pairs, held_out: Pairs, scale: float, seed: int) -> Repair:
    """Fit A, from the identity on, to min CE(norm(tA) ↔ u; scale), where equal captions match, and judge it.

    The bytes depend on the arguments, PyTorch and the kind of processor, and on the number of its threads: call it with one.

    Args:
        scale: The teacher's logit scale (not its logarithm).
    """
    width = held_out.images_ND.shape[1]
    judge = _Judge(held_out)
    before_N = best_N = judge(torch.eye(width))
    map_DD = torch.eye(width, requires_grad=True)
    optimiser = torch.optim.Adam([map_DD], lr=_LEARNING_RATE)
    best_map, best_step = torch.eye(width), 0
    for step, batch in enumerate(_draw_batches(fitted, seed), 1):
        moved_BD = F.normalize(batch.images_ND @ map_DD, dim=1)
        loss = contrast_both_ways(moved_BD, batch.texts_ND, torch.tensor(scale), captions_B=batch.captions_N)
        optimiser.zero_grad()
        (loss / (2 * len(batch))).backward()
        optimiser.step()
        if step % _JUDGED_EVERY:
            continue
        found = _on_grid(map_DD.detach())
        found_N = judge(found)
        if found_N.mean() < best_N.mean():
            best_map, best_step, best_N = found, step, found_N
        if step == _MAX_STEPS or step - best_step >= _PATIENCE:
            break
    gain_N = before_N - best_N
    error = standard_error(gain_N, judge.number_N)
    is_clear = best_step > 0 and float(gain_N.mean()) >= _CLEAR * error
    return Repair(
        map_DD=best_map if is_clear else None,
        fitted=len(fitted),
        held_out=len(held_out),
        captions=len(judge.texts_CD),
        steps=best_step,
        log_rank=(float(before_N.mean()), float(best_N.mean())),
        standard_error=error,
        recall_at_1=(_nearest(before_N), _nearest(best_N)),
    )


def _draw_batches(pairs: Pairs, seed: int) -> Iterator[Pairs]:
    """Yield batches of the pairs in a new order for each pass, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(len(pairs), generator=generator).split(_BATCH):
            yield pairs.take(places)


def _on_grid(map_DD: Tensor) -> Tensor:
    return (map_DD / _GRID).round() * _GRID


class _Judge:
    """Tells how well captions find their images among those of other captions.

    Attributes:
        texts_CD: The rows of the different captions.
        number_N: Which of them is each pair's.
    """

    def __init__(self, pairs: Pairs) -> None:
        _, firsts, numbers = np.unique(pairs.captions_N.numpy(), return_index=True, return_inverse=True)
        self.texts_CD, self.number_N = pairs.texts_ND[torch.from_numpy(firsts)], torch.from_numpy(numbers)
        self._images_ND = pairs.images_ND
        self._is_other_NN = self.number_N[:, None] != self.number_N

    def __call__(self, map_DD: Tensor) -> Tensor:
        """Return the log-rank of each pair with this map, float64 [N]."""
        cosines_CN = self.texts_CD @ F.normalize(self._images_ND @ map_DD, dim=1).T
        cosines_NN = cosines_CN[self.number_N]
        nearer_N = ((cosines_NN > cosines_NN.diagonal()[:, None]) & self._is_other_NN).sum(dim=1)
        return nearer_N.double().log1p()


def standard_error(values_N: Tensor, captions_N: Tensor) -> float:
    """Return that of the mean of some values, float64: the larger of what single pairs and what whole captions give.

    Args:
        captions_N: Number of each one's caption, from 0, int64; at least two differ.
    """
    offsets_N = values_N - values_N.mean()
    of_captions_C = torch.zeros(int(captions_N.max()) + 1, dtype=offsets_N.dtype).index_add(0, captions_N, offsets_N)
    total = len(of_captions_C)
    by_pairs = float(values_N.std()) / math.sqrt(len(values_N))
    by_captions = math.sqrt(float(of_captions_C.square().sum()) * total / (total - 1)) / len(values_N)
    return max(by_pairs, by_captions)


def _nearest(log_rank_N: Tensor) -> float:
    return float((log_rank_N == 0).double().mean())
