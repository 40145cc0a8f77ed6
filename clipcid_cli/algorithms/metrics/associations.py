"""Associations: which of some candidate images belong to a cue, chosen by their similarity to it.

Shape letters beside those of the map: N candidates, of all cues; Q cues.

Source: Bitton et al. 2022 (WinoGAViL), §4; names as mlfoundations/datacomp's evaluation writes them.
"""

from __future__ import annotations

import numpy as np

from clipcid_cli.algorithms.metrics.intervals import Array, CellMetrics

MANY_CANDIDATES = 10

ASSOCIATION_METRICS = ("jaccard_score_10-12", "jaccard_score_5-6", "avg_jaccard_score")


def choose_associated(scores_N: Array, cues_N: Array, is_associated_N: Array) -> Array:
    """Choose as many candidates of each cue as belong to it, the most similar ones, of equal ones the first: bool [N]."""
    order_N = np.lexsort((-scores_N, cues_N))
    starts_N = np.searchsorted(cues_N[order_N], cues_N[order_N])
    wanted_Q = np.bincount(cues_N, weights=is_associated_N)
    is_chosen_N = np.zeros(len(scores_N), np.bool_)
    is_chosen_N[order_N] = np.arange(len(order_N)) - starts_N < wanted_Q[cues_N[order_N]]
    return is_chosen_N


def jaccard_metrics(cues_N: Array, is_associated_N: Array, is_chosen_N: Array) -> CellMetrics:
    """Return the mean Jaccard index |A ∩ B| / |A ∪ B| of what belongs to each cue and what was chosen.

    The mean is over all cues, and over those of few and of many candidates apart; cues are drawn, with all their candidates.
    """
    _, cue_N = np.unique(cues_N, return_inverse=True)
    both_Q = np.bincount(cue_N, weights=is_associated_N & is_chosen_N)
    either_Q = np.bincount(cue_N, weights=is_associated_N | is_chosen_N)
    jaccard_Q = both_Q / np.maximum(either_Q, 1)
    is_large_Q = np.bincount(cue_N) >= MANY_CANDIDATES

    def of_draws(draws_BQ: Array) -> dict[str, Array]:
        parts = (is_large_Q, ~is_large_Q, np.ones_like(is_large_Q))
        means = [_mean(draws_BQ[:, part_Q], jaccard_Q[part_Q]) for part_Q in parts]
        return dict(zip(ASSOCIATION_METRICS, means, strict=True))

    return CellMetrics(np.arange(len(jaccard_Q)), of_draws)


def _mean(draws_BQ: Array, values_Q: Array) -> Array:
    """Return the mean of the values drawn, float64 [B]; NaN where none was."""
    count_B = draws_BQ.sum(axis=1)
    return np.where(count_B > 0, draws_BQ @ values_Q / np.maximum(count_B, 1), np.nan)
