"""The folder of one training run: ``student/``, ``checkpoints/``, ``train.jsonl``, ``results.jsonl``, ``report.html``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.reading import describe, reading

# What the lines of a log hold.
_VALUES = int | float | None


class RunFolder:
    """Names and logs of a run.

    Attributes:
        student: The trained model, in open_clip's form.
        student_ema: The same with the average of its weights over the training, where one was kept.
        train_log: A JSON object for each logged step: losses, rates, times.
        results_log: A JSON object for each evaluation on the held-out part.
        tensorboard: TensorBoard's event files, where requested.
        report: For people.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.student = path / "student"
        self.student_ema = path / "student-ema"
        self.checkpoints = path / "checkpoints"
        self.train_log = path / "train.jsonl"
        self.results_log = path / "results.jsonl"
        self.tensorboard = path / "tensorboard"
        self.report = path / "report.html"

    def students(self, *, ema: bool) -> list[Path]:
        """Return the folders of the models that a run ends with, one more where it keeps an average."""
        return [self.student, self.student_ema] if ema else [self.student]

    def diverged(self, step: int) -> Path:
        """Keys and losses of a batch whose loss or gradient was not finite."""
        return self.path / f"diverged_step_{step:08d}.json"

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for folder in (self.student, self.student_ema, self.checkpoints, self.tensorboard):
            if folder.is_dir():
                shutil.rmtree(folder)
        for file in (self.train_log, self.results_log, self.report, *self.path.glob("diverged_step_*.json")):
            file.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Truncate the logs to `step`: a killed run has logged steps after its last checkpoint, which are repeated."""
        for path in (self.train_log, self.results_log):
            lines = [line for line in read_lines(path) if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def last_values(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the losses and the metrics that were logged last, by name."""
        log, results = read_lines(self.train_log), read_lines(self.results_log)
        losses = {
            name.removeprefix("loss_"): value for name, value in (log or [{}])[-1].items() if name.startswith("loss_")
        }
        return losses, {name: value for name, value in (results or [{}])[-1].items() if name != "step"}


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append JSON objects to a log, one a line; they are on the disk before a checkpoint that comes after them."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    if text:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a log; a last line that a kill left incomplete is omitted."""
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    fix = "Restore it, or train again, by the command of the run and --overwrite."
    with reading(path, "a log of training", fix):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            if not isinstance(content["step"], int) or not all(isinstance(each, _VALUES) for each in content.values()):
                raise TypeError("a value is of another type")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            if number == len(lines):
                break
            raise ClipcidError(f"Line {number:,} of {path} is none of a log: {describe(error)}.", fix) from error
        found.append(content)
    return found
