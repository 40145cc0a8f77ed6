"""The log of a run: when lines reach the disk, and who writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results import run_folder
from clipcid_cli.formats.results.run_folder import RunFolder, TrainingLog, read_lines


def test_lines_are_written_together_after_two_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)
    folder = RunFolder(tmp_path)
    log = TrainingLog(folder, 0, writes=True, tensorboard=False)
    log.add({"step": 1})
    now = 1.9
    log.add({"step": 2})
    assert read_lines(folder.train_log) == []
    now = 2.1
    log.add({"step": 3})
    assert [line["step"] for line in read_lines(folder.train_log)] == [1, 2, 3]
    log.add({"step": 4})
    log.flush()
    assert [line["step"] for line in read_lines(folder.train_log)] == [1, 2, 3, 4]


def test_last_values_are_those_of_the_last_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = TrainingLog(folder, 0, writes=True, tensorboard=False)
    for step in (1, 2):
        log.add({"step": step, "loss": 9.0, "loss_clip": 1.0 / step})
    log.flush()
    assert folder.last_values() == ({"clip": 0.5}, {})
    log.add_evaluation(2, {"acc1": 0.25})
    assert folder.last_values() == ({"clip": 0.5}, {"acc1": 0.25})


def test_a_process_that_does_not_write_leaves_no_file(tmp_path: Path) -> None:
    log = TrainingLog(RunFolder(tmp_path), 0, writes=False, tensorboard=True)
    log.add({"step": 1})
    log.add_evaluation(1, {"acc1": 1.0})
    log.flush()
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line", ["", "{", "5", "[]", '{"loss": 1}', '{"step": "1"}', '{"step": 1, "loss": "x"}', "\0", "\ud800"]
)
def test_a_damaged_line_is_named_unless_it_is_the_last_one(tmp_path: Path, line: str) -> None:
    log, whole = tmp_path / "train.jsonl", b'{"step": 1, "loss": 0.5}\n'
    log.write_bytes(whole + line.encode(errors="surrogatepass"))
    assert read_lines(log) == [{"step": 1, "loss": 0.5}]
    log.write_bytes(whole + line.encode(errors="surrogatepass") + b"\n" + whole)
    with pytest.raises(ClipcidError, match=r"Line 2 of .*train\.jsonl is none of a log"):
        read_lines(log)


def test_a_folder_in_the_place_of_a_log_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="cannot be read"):
        read_lines(tmp_path)
