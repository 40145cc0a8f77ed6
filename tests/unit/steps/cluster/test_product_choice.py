"""k-means ends with the same bits whatever coordinates rows are compared by, and whenever that changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from balance_data import Listener

from clipcid_cli.algorithms.kmeans.best_so_far import Nearest
from clipcid_cli.algorithms.kmeans.leading_coordinates import (
    LeadingCoordinates,
    leading_coordinates,
    principal_directions,
)
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.steps.cluster import lloyd
from clipcid_cli.steps.cluster import product_choice as coordinate_choice
from clipcid_cli.steps.cluster.lloyd import LloydState, first_centroids, run_lloyd
from clipcid_cli.steps.cluster.product_choice import CoordinateChoice, worth_a_trial
from clipcid_cli.steps.cluster.rows import ClusterRows, find_rows
from clipcid_cli.steps.settings.cluster import ClusterSettings

NUM_ROWS, WIDTH, NUM_CLUSTERS = 2500, 160, 70


@pytest.fixture
def rows(tmp_path: Path) -> ClusterRows:
    """A cloud with few strong directions, with equal rows and rows that are not quite of unit length."""
    random = np.random.default_rng(0)
    values = random.normal(size=(NUM_ROWS, WIDTH)) * np.arange(1, WIDTH + 1) ** -0.9
    values[100:140] = values[100]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    values[::7] *= 1.0015
    (tmp_path / "emb" / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "emb" / "img_emb" / "img_emb_0.npy", values.astype(np.float16))
    return find_rows(ClusterSettings(embeddings=tmp_path / "emb", keep_list="none", work=tmp_path), Listener())


def cluster(rows: ClusterRows, machine: Machine) -> list[torch.Tensor]:
    """Return the centroids after each iteration."""
    saved: list[torch.Tensor] = []
    run_lloyd(
        rows,
        machine,
        LloydState(first_centroids(rows, NUM_CLUSTERS, 0), 0, False),
        iterations=6,
        dtype=torch.float32,
        save=lambda state: saved.append(state.centroids_KD.clone()),
        reporter=Listener(),
    )
    return saved


@pytest.mark.parametrize("numbers", [(15, 31), (63, None), (None, 15), (47, 47), (31, 15)], ids=str)
def test_changing_coordinates_changes_nothing(
    rows: ClusterRows, numbers: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_machine("cpu") as machine:
        plain = cluster(rows, machine)
        made = []

        def choose(
            self: CoordinateChoice,
            rows_BD: torch.Tensor,
            num_rows: int,
            centroids_KD: torch.Tensor,
            known: Nearest | None,
        ) -> bool:
            assert num_rows == NUM_ROWS
            assert (known is None) == (len(made) == 0)
            number = numbers[len(made)]
            self._left -= 1
            before: LeadingCoordinates | None = self.chosen
            self.chosen = None if number is None else leading_coordinates(principal_directions(rows_BD), number)
            made.append(number)
            return (before and before.width) != (self.chosen and self.chosen.width)

        monkeypatch.setattr(lloyd, "worth_a_trial", lambda *given: True)
        monkeypatch.setattr(CoordinateChoice, "choose", choose)
        turned = cluster(rows, machine)
    assert made == list(numbers)
    assert len(plain) == len(turned) > 3
    assert all(torch.equal(one, other) for one, other in zip(plain, turned, strict=True))


def test_a_trial_chooses_what_takes_less_time(rows: ClusterRows, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {None: 10.0, 15: 9.0, 31: 5.0, 47: 6.0, 79: 7.0}  # by number of coordinates

    def seconds(self: object, coordinates: LeadingCoordinates | None) -> float:
        return taken[None if coordinates is None else coordinates.width - 1]

    monkeypatch.setattr(coordinate_choice._Trial, "seconds", seconds)
    with open_machine("cpu") as machine:
        features = torch.from_numpy(np.array(rows.features(0, NUM_ROWS)))
        centroids = first_centroids(rows, NUM_CLUSTERS, 0)
        choice = CoordinateChoice(torch.float32, machine, trials=2)
        assert choice.choose(features, NUM_ROWS, centroids, None)
        assert choice.chosen is not None
        assert choice.chosen.width == 32
        assert choice.is_open
        taken[None] = 6.0  # not much more than the least
        assert choice.choose(features, NUM_ROWS, centroids, None)
        assert choice.chosen is None
        assert not choice.is_open
        assert not CoordinateChoice(torch.int8, machine, trials=2).is_open


def test_real_trials_change_nothing(rows: ClusterRows, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_machine("cpu") as machine:
        plain = cluster(rows, machine)
        monkeypatch.setattr(lloyd, "worth_a_trial", lambda *given: True)
        tried = cluster(rows, machine)
    assert all(torch.equal(one, other) for one, other in zip(plain, tried, strict=True))


def test_small_work_and_rows_that_are_not_kept_are_not_tried() -> None:
    assert worth_a_trial(100_000, 4096, 512, 2**31)
    assert not worth_a_trial(100_000, 40, 512, 2**31)
    assert not worth_a_trial(2_000_000, 4096, 512, 2**31)
