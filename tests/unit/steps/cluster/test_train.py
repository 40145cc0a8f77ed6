"""The step's k-means: what it says of the start in few directions, and what it saves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from balance_data import Listener
from kmeans_data import unit

from clipcid_cli.algorithms.kmeans.lloyd import LloydState
from clipcid_cli.algorithms.kmeans.seeding import first_centroids
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.steps.cluster.rows import find_rows
from clipcid_cli.steps.cluster.train import train_centroids
from clipcid_cli.steps.settings.cluster import ClusterSettings


def test_every_iteration_in_full_is_saved_and_the_start_is_announced_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = unit(random.normal(size=(3000, 256)) * np.arange(1.0, 257) ** -0.8)
    (tmp_path / "emb" / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "emb" / "img_emb" / "img_emb_0.npy", values)
    rows = find_rows(ClusterSettings(embeddings=tmp_path / "emb", keep_list="none", work=tmp_path), Listener())
    start = first_centroids(rows, 1024, 0)
    for done, announced in ((0, 1), (3, 0)):
        listener, saved = Listener(), list[int]()
        with open_machine("cpu") as machine:
            state = train_centroids(
                rows,
                machine,
                LloydState(start.clone(), done),
                iterations=12,
                dtype=torch.float32,
                save=lambda state: saved.append(state.iterations),  # noqa: B023  # called within the turn
                reporter=listener,
            )
        assert saved == list(range(max(3, done + 1), state.iterations + 1))
        start_notes = [note for note in listener.told if "first 3 iterations compare images along 64 of 256" in note]
        assert len(start_notes) == announced
