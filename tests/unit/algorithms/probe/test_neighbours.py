"""Weighted nearest neighbours: against loops in float64, with ties and in blocks."""

from __future__ import annotations

import math

import pytest
import torch

from clipcid_cli.algorithms import probe
from clipcid_cli.algorithms.metrics.classification import measure_scores
from clipcid_cli.algorithms.probe import nearest_neighbours, vote


def unit_rows(count: int, width: int, seed: int) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def find(images: torch.Tensor, training: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    cosines, numbers = zip(*nearest_neighbours(images, training, k), strict=True)
    return torch.cat(cosines), torch.cat(numbers)


@pytest.mark.parametrize("at_once", [1024, 3])
def test_neighbours_are_those_of_float64_in_any_blocks(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probe._IMAGES, "cpu", at_once)
    training, images = unit_rows(12, 4, seed=0), unit_rows(8, 4, seed=1)
    # Copies, so that many cosines are equal, also at the last place.
    training = torch.cat([training, training[:9], training[3:4].repeat(4, 1)])
    images = torch.cat([images, training[2:4]])
    exact = images.double() @ training.double().T
    for k in (1, 2, 5, 11, len(training)):
        cosines, numbers = find(images, training, k)
        expected = exact.sort(dim=1, descending=True).values[:, :k]
        assert cosines.dtype == torch.float64
        assert float((cosines - expected).abs().max()) < 1e-6
        assert float((exact.gather(1, numbers) - expected).abs().max()) < 1e-6
        assert all(len(set(row)) == k for row in numbers.tolist())
        is_equal = cosines[:, :-1] == cosines[:, 1:]
        assert bool((numbers[:, :-1] < numbers[:, 1:])[is_equal].all())


@pytest.mark.parametrize("scores_at_once", [2**22, 30])
def test_votes_are_loops_in_float64(scores_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_SCORES", scores_at_once)
    training, images = unit_rows(40, 6, seed=2), unit_rows(23, 6, seed=3)
    labels = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(4))
    several = torch.rand(40, 9, generator=torch.Generator().manual_seed(5)) < 0.2
    cosines, numbers = find(images, training, 7)
    scores, shares = (torch.cat(list(vote(cosines, numbers, own, 9))) for own in (labels, several))
    for row in range(len(images)):
        weights = [math.exp(cosine / 0.07) for cosine in cosines[row].tolist()]
        for number in range(9):
            voters = list(zip(weights, numbers[row].tolist(), strict=True))
            one = sum(weight for weight, voter in voters if labels[voter] == number) / sum(weights)
            many = sum(weight for weight, voter in voters if several[voter, number]) / sum(weights)
            assert float(scores[row, number]) == pytest.approx(one or -math.inf, rel=1e-12)
            assert float(shares[row, number]) == pytest.approx(many or -math.inf, rel=1e-12)


def test_a_class_without_a_vote_is_never_right() -> None:
    # One neighbour: of six classes only its own is in question, though classes 0 … 3 would fill up the first five.
    cosines, numbers = find(torch.eye(3)[:2], torch.eye(3), 1)
    scores = list(vote(cosines, numbers, torch.tensor([5, 4, 0]), 6))
    assert measure_scores(scores, torch.tensor([5, 0]), 6)["acc5"] == 0.5
