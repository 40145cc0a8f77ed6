"""The space that student and stored teacher share: its axes are found once for the same embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from balance_data import Listener, write_embeddings

from clipcid_cli.algorithms.losses.shared_space import SharedSpace, principal_axes, second_moment
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.distill import teacher
from clipcid_cli.steps.distill.teacher import choose_space
from clipcid_cli.steps.settings.distill import DistillSettings


def choose(work: Path, folder: Path, space: str = "pca", **settings: Any) -> SharedSpace:
    given = DistillSettings(student="student.json", teacher_space=space, work=work, **settings)
    with open_dist_context("cpu") as context:
        return choose_space(given, 32, open_embeddings(folder), 24, context, Listener())


def test_axes_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    folder, work = write_embeddings(tmp_path / "embeddings", rows), tmp_path / "work"
    dry = choose(work, folder, dry_run=True)
    assert not work.exists()
    first = choose(work, folder)
    expected = principal_axes(second_moment([rows], 32), 24)
    read = second_moment

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("the rows are read again")

    monkeypatch.setattr(teacher, "second_moment", refuse)
    for space in (dry, first, choose(work, folder), choose(work, folder, dry_run=True)):
        assert space.axes is not None
        assert torch.equal(space.axes.basis_Dd, expected.basis_Dd)
    with pytest.raises(AssertionError, match="again"):
        choose(work, write_embeddings(tmp_path / "others", rows[:-1]))
    (kept,) = work.rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(AssertionError, match="again"):
        choose(work, folder)
    monkeypatch.setattr(teacher, "second_moment", read)
    assert choose(work, folder).axes is not None
    assert np.load(kept).shape == (32, 32)


def test_losses_that_compare_no_features_of_student_and_teacher_need_no_shared_space(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float16)
    folder = write_embeddings(tmp_path / "embeddings", rows)
    for preset in ("dr", "clip-kd"):
        space = choose(tmp_path, folder, "auto", preset=preset)
        assert (space.width == 32 and space.axes is None and not space.is_learned) == (preset == "dr")
    assert choose(tmp_path, folder, "pca", preset="dr").axes is not None
