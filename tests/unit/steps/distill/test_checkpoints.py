"""From which checkpoint a run goes on, and that others are written meanwhile, unless processes train different students."""

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
from clipcid_cli.formats.files import write_text
from clipcid_cli.formats.output import OutputSpec, open_output
from clipcid_cli.formats.results.run_folder import RunFolder, list_checkpoints, read_checkpoint, write_checkpoint
from clipcid_cli.formats.sidecar import Sidecar
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps.distill import checkpoints
from clipcid_cli.steps.distill.checkpoints import Checkpoints, begin_run
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


def test_a_run_goes_on_from_its_newest_checkpoint_or_is_new(tmp_path: Path) -> None:
    folder, spec = RunFolder(tmp_path), OutputSpec(tmp_path, "distill", Sidecar, settings={}, inputs=[])

    def begin(requested: str) -> tuple[int, bool]:
        with open_output(spec) as output:
            return begin_run(output, folder, requested), folder.train_log.exists()

    with pytest.raises(ClipcidError, match="no checkpoint of an unfinished run with these settings"):
        begin("latest")
    write_text(folder.train_log, "of another run")
    assert begin("auto") == (0, False)
    write_text(folder.train_log, "of a start that has saved nothing")
    assert begin("auto") == (0, False)
    for step in (3, 5):
        write_checkpoint(folder.checkpoints, step, {})
    write_text(folder.train_log, "of its steps")
    assert [begin("auto"), begin("latest"), begin("never")] == [(5, True), (5, True), (0, False)]
    assert list_checkpoints(folder.checkpoints) == []


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
