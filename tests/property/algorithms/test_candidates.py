"""ClusterCandidates of the cluster loss: which centroids are drawn, and that the correction is right on average."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clipcid_cli.algorithms.losses.cluster import draw_candidates


@st.composite
def draws(draw: st.DrawFn) -> tuple[np.ndarray, int, float, int, int]:
    num_clusters = draw(st.integers(1, 400))
    named = draw(st.lists(st.integers(0, num_clusters - 1), min_size=1, max_size=40))
    ratio = draw(st.floats(0, 1))
    minimum = draw(st.integers(0, 500))
    return np.array(named), num_clusters, ratio, minimum, draw(st.integers(0, 2**40))


@given(draws())
def test_candidates_hold_all_named_and_enough_others_once(case: tuple[np.ndarray, int, float, int, int]) -> None:
    named, num_clusters, ratio, minimum, seed = case
    found = draw_candidates(named[:, None], num_clusters, ratio=ratio, minimum=minimum, seed=seed)
    active = set(named.tolist())
    assert set(found.ids[: len(active)].tolist()) == active
    assert len(set(found.ids.tolist())) == len(found.ids)
    assert found.ids.min() >= 0
    assert found.ids.max() < num_clusters
    assert len(found.ids) >= min(num_clusters, minimum)
    drawn, rest = len(found.ids) - len(active), num_clusters - len(active)
    assert drawn >= min(rest, math.ceil(ratio * num_clusters))
    assert not found.log_correction_S[: len(active)].any()
    assert np.allclose(found.log_correction_S[len(active) :], math.log(rest / drawn) if drawn else 0.0)
    again = draw_candidates(named[::-1, None], num_clusters, ratio=ratio, minimum=minimum, seed=seed)
    assert np.array_equal(found.ids, again.ids)


def test_corrected_normaliser_is_unbiased_and_plain_one_is_not() -> None:
    random = np.random.default_rng(0)
    num_clusters, exponentials = 2_000, np.exp(random.normal(size=2_000))
    stored = random.choice(num_clusters, (8, 16), replace=False)  # the first four of each are active
    full = exponentials.sum()
    corrected, plain = [], []
    for seed in range(300):
        found = draw_candidates(stored, num_clusters, ratio=0.1, minimum=0, seed=seed)
        assert len(found.ids) == 8 * 4 + 200
        corrected.append((np.exp(found.log_correction_S) * exponentials[found.ids]).sum())
        plain.append(exponentials[found.ids].sum())
    assert np.array_equal(
        draw_candidates(stored, num_clusters, ratio=0, minimum=0, seed=0).ids, np.sort(stored, axis=None)
    )
    without = draw_candidates(stored, num_clusters, ratio=0.1, minimum=0, seed=0, corrected=False)
    assert set(stored.ravel()) <= set(without.ids[: stored.size]), "else nothing would stand for the rest of the target"
    assert not without.log_correction_S.any()
    error = np.std(corrected) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected) - full) < 4 * error
    assert np.mean(plain) < 0.2 * full
