"""The folder of one training run: ``student/``, ``checkpoints/``, ``report.html``, and what is logged while it trains.

Logs are ``train.jsonl``, ``results.jsonl`` and, where requested, the files of a board. ``held_out.parquet`` has the keys
that were held out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pyarrow as pa
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import (
    LARGEST_TEXT,
    atomic_file,
    describe,
    read_regular,
    reading,
    sync_folder,
    write_error,
    write_text,
)
from clipcid_cli.formats.output import unfinished
from clipcid_cli.formats.parquet import read_columns, write_row_groups
from clipcid_cli.formats.sidecar import DataSpec, Sidecar
from clipcid_cli.formats.skipped import SKIPPED

AVERAGED = "ema/"
"""What the names of metrics of the averaged weights begin with."""

_HELD_OUT = pa.schema({"key": pa.large_string()})
PHASES = ("data_wait", "copy", "forward_backward", "optimizer", "evaluation", "checkpoint")
"""What a line of ``train.jsonl`` counts seconds of, as ``seconds_<phase>``."""

# Should the newest checkpoint be damaged on a failing disk, the run is not lost.
_CHECKPOINTS_KEPT = 2
# Seconds after which logged lines reach the disk.
_FLUSH_SECONDS = 2.0


class DistillMade(msgspec.Struct):
    """What is read of the settings of `distill`."""

    losses: dict[str, dict[str, Any]]
    ema: float | None = None
    text_tower: str = "own"


class AppliedKeepList(msgspec.Struct):
    """A keep list that training applied, and how many of its images it keeps."""

    path: str
    kept: int
    images: int


class DistillSidecar(Sidecar, kw_only=True):
    """``distill.json``; without a keep list all samples were used."""

    model: dict[str, Any]
    teacher: str | None = None  # by its name for people; None where there was none, or nothing records it
    data: DataSpec
    keep_list: AppliedKeepList | None
    result: dict[str, Any]

    @property
    def made(self) -> DistillMade:
        """What is read of the settings."""
        return msgspec.convert(self.settings, DistillMade)

    def held_out_metrics(self, *, averaged: bool) -> dict[str, float]:
        """Return what the held-out part gave in the end, of the student or of its averaged weights."""
        prefix = AVERAGED if averaged else ""
        named = {
            name.removeprefix(prefix): value
            for name, value in self.result["metrics"].items()
            if name.startswith(prefix)
        }
        return {name: value for name, value in named.items() if "/" not in name}  # others are of --eval-data


class RunFolder:
    """Names of a run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.student = path / "student"  # in open_clip's form
        self.student_ema = path / "student-ema"  # with the average of its weights over the training
        self.checkpoints = path / "checkpoints"
        self.train_log = path / "train.jsonl"  # an object for each logged step: losses, rates, times
        self.results_log = path / "results.jsonl"  # an object for each evaluation on the held-out part
        self.held_out = path / "held_out.parquet"
        self.skipped = path / SKIPPED
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.report = path / "report.html"

    def students(self, *, ema: bool) -> list[Path]:
        """Return the folders of the models that a run ends with, one more where it keeps an average."""
        return [self.student, self.student_ema] if ema else [self.student]

    def diverged(self, step: int) -> Path:
        """Keys and losses of a batch whose loss or gradient was not finite."""
        return self.path / f"diverged_step_{step:08d}.json"

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for folder in (self.student, self.student_ema, self.checkpoints, self.tensorboard, self.wandb):
            if folder.is_dir():
                shutil.rmtree(folder)
        files = (self.train_log, self.results_log, self.held_out, self.skipped, self.report)
        for file in (*files, *self.path.glob("diverged_step_*.json")):
            file.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Truncate the logs to `step`: a killed run has logged steps after its last checkpoint, which are repeated."""
        for path in (self.train_log, self.results_log):
            lines = [line for line in read_lines(path) if line["step"] <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def last_values(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the losses and the metrics that were logged last, by name."""
        step = (read_lines(self.train_log) or [{}])[-1]
        losses = {name.removeprefix("loss_"): value for name, value in step.items() if name.startswith("loss_")}
        evaluation = (read_lines(self.results_log) or [{}])[-1]
        return losses, {name: value for name, value in evaluation.items() if name != "step"}


def write_held_out(path: Path, keys: pa.ChunkedArray) -> None:
    """Write the keys of the samples that a run holds out, n strings."""
    write_row_groups(path, _HELD_OUT, len(keys), lambda part: [keys[part].cast(pa.large_string())], store_schema=False)


def read_held_out(run: Path) -> frozenset[str]:
    """Return the keys of the samples that a finished run held out."""
    path, fix = RunFolder(run).held_out, "Name a data set: clipcid eval-zeroshot MODEL DATA"
    if not path.exists():
        raise ClipcidError(
            f"There is no {path}: earlier versions did not record what a run held out, and counted dropped copies of "
            "training images among it.",
            f"{fix}\nOr train again: the command of the run, with --overwrite.",
        )
    return frozenset(read_columns(path, {"key": pa.large_string()}, fix)["key"].to_pylist())


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint made after `step` steps."""
    return folder / f"step_{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the existing checkpoints, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob(f"step_{'[0-9]' * 8}.pt"))


def write_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write a checkpoint (tensors, numbers, texts, and dicts and lists of them), then remove all but the newest ones."""
    with atomic_file(checkpoint_path(folder, step)) as file:
        torch.save(state, file)
    sync_folder(folder)  # before the earlier ones go
    remove_old_checkpoints(folder)


def remove_old_checkpoints(folder: Path) -> None:
    """Remove all but the newest checkpoints."""
    for old in list_checkpoints(folder)[:-_CHECKPOINTS_KEPT]:
        checkpoint_path(folder, old).unlink(missing_ok=True)


def read_checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are admitted, so the file cannot run code."""
    path = checkpoint_path(folder, step)
    fix = "Remove it to resume from the one before, or start over with --resume never."
    with reading(path, "a checkpoint", fix):
        # `weights_only` builds tensors and plain values, and calls nothing that the file names.
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}, not the state of a run")
        return state


def append_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append JSON objects to a log, one a line; they are on the disk before a checkpoint that comes after them."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    if text:
        try:
            with open(path, "a", encoding="utf-8", opener=_open_no_link) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(path, error) from error


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a log; a last line that a kill left incomplete is omitted."""
    entries: list[dict[str, Any]] = []
    if not path.exists():
        return entries
    fix = "Restore it, or train again: the command of the run, with --overwrite."
    with reading(path, "a log of training", fix):
        lines = read_regular(path, LARGEST_TEXT).splitlines()
    for count, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            values = [content["step"], *content.values()]
            if not (isinstance(values[0], int) and all(isinstance(value, int | float | None) for value in values)):
                raise TypeError("a value is of another type")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            if count == len(lines):
                break
            raise ClipcidError(f"Line {count:,} of {path} is not a line of a log: {describe(error)}.", fix) from error
        entries.append(content)
    return entries


def last_step(*logs: list[dict[str, Any]]) -> int:
    """Return the last step that any of a run's logs has; 0 where nothing was logged."""
    return max((line["step"] for log in logs for line in log[-1:]), default=0)


def planned_steps(run: Path) -> int | None:
    """Return how many steps an unfinished run has in the end; None where it does not record that."""
    begun = unfinished(run, "distill")
    steps = None if begun is None else begun.settings.get("steps")
    return steps if isinstance(steps, int) else None  # whoever wrote the record chose its type


def describe_progress(run: Path) -> str:
    """Say in brackets how far an unfinished run has come; empty where that cannot be read."""
    folder = RunFolder(run)
    with suppress(ClipcidError):
        step = last_step(read_lines(folder.train_log), read_lines(folder.results_log))
        planned = planned_steps(run)
        return f" ({step:,} steps)" if planned is None else f" ({step:,} of {planned:,} steps)"
    return ""


class Board(Protocol):
    """A program that shows the values of a run while it trains."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Show values, by names such as ``train/loss``."""

    def flush(self) -> None:
        """Write what was added."""

    def close(self) -> None:
        """End; nothing is added any more."""


class TrainingLog:
    """The logs of a run. Lines of training steps are written every two seconds, evaluations at once."""

    def __init__(self, folder: RunFolder, board: Board | None = None, *, writes: bool) -> None:
        self._folder = folder
        self._writes = writes
        self._board = board
        self._lines: list[dict[str, Any]] = []
        self._flushed = time.monotonic()

    def add(self, line: dict[str, Any]) -> None:
        """Log a training step: ``step`` and its values by name."""
        self._lines.append(line)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def add_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._write("eval", self._folder.results_log, [{"step": step, **metrics}])

    def flush(self) -> None:
        # Forgotten first: where the disk is full, `close` does not write the same lines again.
        lines, self._lines = self._lines, []
        self._write("train", self._folder.train_log, lines)
        if self._board is not None:
            self._board.flush()
        self._flushed = time.monotonic()

    def _write(self, group: str, path: Path, lines: list[dict[str, Any]]) -> None:
        """Append lines to a log, and give those of their values that are finite numbers to the board."""
        if self._writes:
            append_lines(path, lines)
        if self._board is None:
            return
        for line in lines:
            numbers = {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
            finite = {f"{group}/{name}": value for name, value in numbers.items() if math.isfinite(value)}
            self._board.add(line["step"], finite)

    def close(self) -> None:
        """Write the lines that are left, whatever ended the run, and close the board."""
        try:
            self.flush()
        finally:
            if self._board is not None:
                self._board.close()
