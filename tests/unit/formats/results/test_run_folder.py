"""The files of a training run: checkpoints, and logs that a killed run has written on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.run_folder import (
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


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"5", b"[]", b'{"loss": 1}', b'{"step": "1"}', b'{"step": 1, "loss": "x"}', b"\0", b"\xed\xa0\x80"],
)
def test_a_damaged_line_is_named_unless_it_is_the_last_one(tmp_path: Path, line: bytes) -> None:
    log, whole = tmp_path / "train.jsonl", b'{"step": 1, "loss": 0.5}\n'
    log.write_bytes(whole + line)
    assert read_lines(log) == [{"step": 1, "loss": 0.5}]
    log.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(ClipcidError, match=r"Line 2 of .*train\.jsonl is not a line of a log"):
        read_lines(log)
