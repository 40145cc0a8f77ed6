"""Checkpoints are written while training goes on, and not where processes train different students."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_in_two
from teaching_data import ALONE
from torch import nn

from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.run_folder import RunFolder, list_checkpoints, read_checkpoint
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps.distill import checkpoints
from clipcid_cli.steps.distill.checkpoints import Checkpoints
from clipcid_cli.training.optimisers import Recipe
from clipcid_cli.training.train_state import TrainState

RECIPE = Recipe("adamw", 0.1, 0.0, (0.9, 0.98), 1e-6, 0, 10, None)


def make_state() -> TrainState:
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    model.logit_scale = nn.Parameter(torch.tensor(2.0))
    state = TrainState(model, LossParameters([], 2, SharedSpace(2), seed=0), RECIPE)
    state.step = 4
    return state


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, allowed, write = threading.Event(), threading.Event(), checkpoints.write_checkpoint

    def write_late(*content: Any) -> None:
        begun.set()
        assert allowed.wait(10)
        write(*content)

    monkeypatch.setattr(checkpoints, "write_checkpoint", write_late)
    state, folder = make_state(), RunFolder(tmp_path)
    saving = Checkpoints(folder, ALONE)
    saving.save(state, {})
    assert begun.wait(10)
    assert saving.saved_step == 0
    nn.init.zeros_(state.module.weight)  # a further step
    allowed.set()
    saving.finish()
    saving.close()
    assert saving.saved_step == 4
    assert torch.equal(read_checkpoint(folder.checkpoints, 4)["module"]["weight"], torch.ones(2, 3))


def test_what_prevents_a_checkpoint_is_an_error_at_the_next(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    saving = Checkpoints(RunFolder(tmp_path), ALONE)
    saving.save(make_state(), {})
    with pytest.raises(ClipcidError, match="checkpoints"):
        saving.save(make_state(), {})
    assert saving.saved_step == 0


def save_both(rank: int, folder: Path) -> list[str]:
    """Save a student that processes have in common, and one of which a bit differs; return the errors."""
    context = DistContext(rank, 2, rank, torch.device("cpu"))
    errors = []
    for name in ("same", "different"):
        state = make_state()
        if name == "different" and rank:
            state.module.weight.detach().view(torch.int32)[0, 0] += 1
        saving = Checkpoints(RunFolder(folder / name), context)
        try:
            saving.save(state, {})
            saving.finish()
            errors.append("")
        except ClipcidError as error:
            errors.append(error.message)
    return errors


def test_processes_with_different_students_save_none(tmp_path: Path) -> None:
    for same, different in run_in_two(save_both, tmp_path, tmp_path):
        assert same == ""
        assert different.startswith(
            "After step 4 the processes no longer train the same student: the weights of process 1 are not those of"
        )
    assert list_checkpoints(tmp_path / "same" / "checkpoints") == [4]
    assert list_checkpoints(tmp_path / "different" / "checkpoints") == []
