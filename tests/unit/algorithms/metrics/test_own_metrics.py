"""Metrics of single data sets against scikit-learn and loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from clipcid_cli.algorithms.metrics.associations import choose_associated, jaccard_metrics
from clipcid_cli.algorithms.metrics.groups import OwnMetric, own_metrics

IMAGES, CLASSES = 200, 9


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(3)


def test_f1_and_the_worst_group_are_as_wilds_defines_them(generator: np.random.Generator) -> None:
    labels = generator.integers(2, CLASSES, IMAGES)  # two classes have no image, and are predicted
    predicted = generator.integers(CLASSES, size=IMAGES)
    ranks = np.where(predicted == labels, 0, generator.integers(1, CLASSES, IMAGES))
    groups = generator.integers(3, 8, IMAGES)
    f1 = own_metrics(OwnMetric("f1"), labels, predicted, ranks, None, CLASSES)
    expected = f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    assert f1.values()["f1"] == pytest.approx(expected, abs=1e-12)
    assert f1.values()["acc1"] == np.mean(predicted == labels)
    for top in (1, 5):
        worst = own_metrics(OwnMetric("worst", 0, top), labels, predicted, ranks, groups, CLASSES)
        shares = [np.mean(ranks[groups == group] < top) for group in range(3, 8)]
        assert worst.values()["worst"] == pytest.approx(min(shares), abs=1e-12)
        low, high = worst.intervals(200, 0)["worst"]
        assert 0 <= low < high <= max(shares)


def test_the_most_similar_candidates_are_chosen_for_each_cue(generator: np.random.Generator) -> None:
    sizes = [5, 10, 6, 12, 5]
    cues = np.repeat([4, 0, 7, 2, 3], sizes)  # candidates of a cue lie together, in any order of the cues
    associated = generator.random(len(cues)) < 0.4
    associated[np.cumsum(sizes) - 1] = True
    scores = generator.normal(size=len(cues))
    chosen = choose_associated(scores, cues, associated)
    jaccard = []
    for own in np.split(np.arange(len(cues)), np.cumsum(sizes)[:-1]):
        best = np.argsort(scores[own])[-associated[own].sum() :]
        jaccard.append(jaccard_score(associated[own], np.isin(np.arange(len(own)), best)))
    assert jaccard_metrics(cues, associated, chosen).values() == {
        "jaccard_score_10-12": pytest.approx(np.mean([jaccard[1], jaccard[3]])),
        "jaccard_score_5-6": pytest.approx(np.mean([jaccard[0], jaccard[2], jaccard[4]])),
        "avg_jaccard_score": pytest.approx(np.mean(jaccard)),
    }
    first = choose_associated(np.zeros(4), np.zeros(4, np.int64), np.array([False, True, True, False]))
    assert first.tolist() == [True, True, False, False], "of equally similar ones the first"
