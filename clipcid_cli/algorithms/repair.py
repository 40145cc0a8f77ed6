"""The repair of a teacher: a linear map of its image rows, after which they meet the text rows.

A teacher's images may be good and their pairing with texts poor. Losses that compare a student with the teacher then teach
that pairing. The repair is fitted to pairs, from the identity on. How many steps of that are best, and whether the repair is
better than none, is told by pairs of which it has seen neither caption nor image: groups of pairs that share either are
dealt to five folds, and each fold judges a repair that was fitted to the others.

It is judged by the **log-rank**, from caption to image: the mean of ln(1 + number of images of other captions nearer to the
caption than the pair's own). Other measures follow noise: the loss it is fitted by falls for a mere change of sharpness, and
the rank of captions by an image for what all images have in common, such as which captions are frequent. Pairs of one
group rise and fall together, so the standard error is that of groups where it is the larger.

With enough pairs even a good teacher gains significantly on the data at hand, and loses on other data. So the gain must
also be large: only a teacher that pairs badly is repaired.

Shape letters: N pairs, D width, C different captions, M different images, G groups.

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
from clipcid_cli.algorithms.pairing import Matches, Pairs, summarise_ranks
from clipcid_cli.algorithms.sets.components import connected_components
from clipcid_cli.records import Repair

MAX_PAIRS = 10_000
"""Pairs that are enough for any data; judging costs the square of their number."""
# With fewer groups nothing can be told.
_MIN_GROUPS = 4
_FOLDS = 5

_BATCH = 512
_LEARNING_RATE = 1e-3
_MAX_STEPS = 150
_JUDGED_EVERY = 5
_STOP_AFTER = 25
# Entries of the map are multiples of this.
_GRID = 2.0**-16


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a repair must gain to be taken."""

    standard_errors: float = 3.0  # of the gain in log-rank, at least
    rank_falls_by: float = 2.0  # factor of 1 + number of nearer images, geometric mean, at least
    recall_rises_by: float = 1.5  # factor of recall at 1, more than

    def is_clear(self, gain: float, error: float) -> bool:
        """Tell whether a gain in log-rank is more than chance, by its standard error."""
        return gain > 0 and gain >= self.standard_errors * error

    def is_large(self, gain: float, recall_at_1: tuple[float, float]) -> bool:
        """Tell whether a gain in log-rank is large, and that in recall at 1, given before and after."""
        before, after = recall_at_1
        return gain >= math.log(self.rank_falls_by) and after > self.recall_rises_by * before


RULE = Rule()


def can_be_divided(pairs: Pairs) -> bool:
    """Tell whether a repair can be fitted to some of these pairs and judged by others."""
    return len(np.unique(group_pairs(pairs))) >= _MIN_GROUPS


def fit_repair(pairs: Pairs, scale: float, seed: int, rule: Rule = RULE) -> tuple[Repair, Tensor | None]:
    """Fit A, from the identity on, to min CE(norm(tA) ↔ u; scale), and judge it.

    Return the verdict and, where the repair is taken, A, float32 [D, D]. Its entries are multiples of 2⁻¹⁶: products of
    float16 rows and A, added in float64, are exact in any order.

    The bytes depend on the arguments, PyTorch and the kind of processor, and on the number of its threads: call it with one.

    Args:
        pairs: Enough of them, see `are_enough` and `can_be_divided`.
        scale: The teacher's logit scale (not its logarithm).
        rule: What the repair must gain to be taken.
    """
    group_N = group_pairs(pairs)
    fold_N = deal_groups(group_N, seed)
    folds = np.unique(fold_N)  # a group of many pairs leaves folds between without any
    fits = [_Fit(pairs.take(fold_N != fold), scale, seed) for fold in folds]
    judges = [_Judge(pairs.take(fold_N == fold)) for fold in folds]
    judged_group_N = torch.cat([group_N[fold_N == fold] for fold in folds])

    def judge() -> tuple[Tensor, float]:
        verdicts = [judge(fit.map_DD.detach()) for judge, fit in zip(judges, fits, strict=True)]
        nearer_N = torch.cat([nearer for nearer, _ in verdicts])
        return nearer_N, sum(nearest for _, nearest in verdicts) / len(pairs)

    best_nearer_N, recall = judge()
    before_N = best_N = best_nearer_N.double().log1p()
    recall_before = recall
    best_step = 0
    for step in range(1, _MAX_STEPS + 1):
        for fit in fits:
            fit.step()
        if step % _JUDGED_EVERY == 0:
            nearer_N, recall_now = judge()
            log_rank_N = nearer_N.double().log1p()
            if log_rank_N.mean() < best_N.mean():
                best_step, best_N, recall = step, log_rank_N, recall_now
                best_nearer_N = nearer_N
            if step - best_step >= _STOP_AFTER:
                break
    gain_N = before_N - best_N
    gain, error = float(gain_N.mean()), standard_error(gain_N, judged_group_N)
    map_DD = pairing = None
    if rule.is_clear(gain, error) and rule.is_large(gain, (recall_before, recall)):
        whole = _Fit(pairs, scale, seed)
        for _ in range(best_step):
            whole.step()
        map_DD = (whole.map_DD.detach() / _GRID).round() * _GRID
        others_N = torch.cat([judge.others_N for judge in judges])
        pairing = summarise_ranks(best_nearer_N.numpy(), others_N.numpy(), repaired=True)
    repair = Repair(
        repaired=map_DD is not None,
        steps=best_step,
        log_rank=(float(before_N.mean()), float(best_N.mean())),
        standard_error=error,
        recall_at_1=(recall_before, recall),
        chance_at_1=sum(judge.guessed for judge in judges) / len(pairs),
        pairs=len(pairs),
        captions=len(np.unique(pairs.captions_N)),
        pairing=pairing,
    )
    return repair, map_DD


def group_pairs(pairs: Pairs) -> Tensor:
    """Return the group of each pair, int64 [N]: pairs of one group share captions or images, directly or through others."""
    matches = Matches.of(pairs.images_ND, pairs.captions_N)
    num_captions = len(matches.first_C)
    captions, images = matches.caption_N.numpy(), num_captions + matches.image_N.numpy()
    labels = connected_components(num_captions + len(matches.first_M), captions, images)
    return torch.from_numpy(labels[captions].astype(np.int64))


def deal_groups(groups_N: Tensor, seed: int) -> Tensor:
    """Deal different groups, four at least, to folds of about as many pairs; return the fold of each pair, int64 [N]."""
    groups, number_N, counts = np.unique(groups_N, return_inverse=True, return_counts=True)
    num_folds = min(_FOLDS, len(groups) // 2)
    order = np.random.default_rng(seed).permutation(len(groups))
    middles = np.cumsum(counts[order]) - counts[order] / 2
    fold_G = np.empty(len(groups), dtype=np.int64)
    fold_G[order] = middles * num_folds // len(number_N)
    return torch.from_numpy(fold_G[number_N])


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
        self._matches = matches = Matches.of(pairs.images_ND, pairs.captions_N)
        self._images_MD, self._texts_CD = pairs.images_ND[matches.first_M], pairs.texts_ND[matches.first_C]
        self._paired_CM = matches.table()
        self._is_other_NM = ~self._paired_CM[matches.caption_N]
        self.others_N = self._is_other_NM.sum(dim=1)  # images of other captions
        # To how many pairs' images a guess gives a caption of their own, in the mean.
        self.guessed = float(self._paired_CM.double().mean(dim=0)[matches.image_N].sum())

    def __call__(self, map_DD: Tensor) -> tuple[Tensor, int]:
        """Return how many images of other captions are nearer to each caption than its own, with this map, int64 [N].

        And for how many pairs the caption nearest to the image is one of the image's own.
        """
        matches = self._matches
        cosines_CM = self._texts_CD @ F.normalize(self._images_MD @ map_DD, dim=1).T
        cosines_NM = cosines_CM[matches.caption_N]
        own_N1 = cosines_NM.gather(1, matches.image_N[:, None])
        nearer_N = ((cosines_NM > own_N1) & self._is_other_NM).sum(dim=1)
        is_right_M = self._paired_CM.gather(0, cosines_CM.argmax(dim=0)[None])[0]
        return nearer_N, int(is_right_M[matches.image_N].sum())


def standard_error(values_N: Tensor, groups_N: Tensor) -> float:
    """Return the standard error of a mean over pairs, float64: of independent pairs or of independent groups, the larger."""
    _, number_N = np.unique(groups_N, return_inverse=True)
    of_groups_G = np.bincount(number_N, weights=values_N - values_N.mean())
    total = len(of_groups_G)
    by_pairs = float(values_N.std()) / math.sqrt(len(values_N))
    by_groups = math.sqrt(float((of_groups_G**2).sum()) * total / (total - 1)) / len(values_N)
    return max(by_pairs, by_groups)
