"""The files of a training run: checkpoints, and logs that a killed run has written on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.run_folder import (
    RunFolder,
    append_lines,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    read_lines,
    write_checkpoint,
)


def test_newest_two_checkpoints_are_kept_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, {"step": step})
    assert list_checkpoints(tmp_path) == [20, 30]
    path = checkpoint_path(tmp_path, 30)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ClipcidError, match=r"step_00000030\.pt cannot be read"):
        read_checkpoint(tmp_path, 30)


def test_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "harmed"),))

    torch.save({"step": Harmful()}, checkpoint_path(tmp_path, 1))
    with pytest.raises(ClipcidError):
        read_checkpoint(tmp_path, 1)
    assert not (tmp_path / "harmed").exists()


def test_logs_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    append_lines(run.train_log, [{"step": step, "loss": 1 / step} for step in range(1, 8)])
    append_lines(run.results_log, [{"step": 4}, {"step": 6}])
    with run.train_log.open("a") as file:
        file.write('{"step": 8, "lo')  # what a kill left
    run.rewind(5)
    assert [line["step"] for line in read_lines(run.train_log)] == [1, 2, 3, 4, 5]
    assert read_lines(run.results_log) == [{"step": 4}]
    assert all(json.loads(line) for line in run.train_log.read_text().splitlines())
