"""Which results `--compare` compares: the files of both sides, read, or an error that names those there are."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import match_pattern
from clipcid_cli.formats.results.metrics import (
    LINEAR_PROBE,
    EvaluationSidecar,
    Metrics,
    Predictions,
    predictions_path,
    read_metrics,
    read_predictions,
    validate_unchanged_metrics,
)
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps.settings.comparing import ComparingSettings

# Metrics files that an error names.
_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Result:
    """One result to compare: its metrics file, and what lies beside it."""

    path: Path
    metrics: Metrics
    sidecar: EvaluationSidecar | None
    predictions: Predictions

    @property
    def dataset(self) -> str:
        return self.predictions.dataset

    @property
    def prefix(self) -> str:
        """How the names of its metrics begin."""
        return "lp_" if self.metrics.task == LINEAR_PROBE else ""


def read_sides(settings: ComparingSettings) -> list[list[Result]]:
    """Read the results of both sides."""
    command = f"clipcid {settings.command}"
    sides = [_find_files(side) for side in settings.compared]
    paths = [path for side in sides for path in side]
    work = WorkDirectory(settings.work)
    for path in paths:
        if path.is_dir():
            raise _folder_error(path, work, command)
        if not path.exists():
            raise _missing_error(path, work, command)
    again = f"Run {command} --predictions --overwrite for that model and data set again."
    sidecars = [validate_unchanged_metrics(path, again) for path in paths]
    records = [read_metrics(path) for path in paths]
    _validate_tasks(paths, records, settings)
    predictions = [read_predictions(predictions_path(path), command) for path in paths]
    results = list(map(Result, paths, records, sidecars, predictions))
    return [results[: len(sides[0])], results[len(sides[0]) :]]


def _find_files(side: str) -> list[Path]:
    """Return the file of one side, or those that a pattern matches, seed 2 before seed 10, or that commas separate."""
    if os.path.exists(side):
        return [Path(side)]
    return [Path(file) for part in side.split(",") for file in match_pattern(part)]


def _validate_tasks(paths: Sequence[Path], records: Sequence[Metrics], settings: ComparingSettings) -> None:
    """Refuse results of the other evaluation."""
    for path, metrics in zip(paths, records, strict=True):
        command = "eval-linear" if metrics.task == LINEAR_PROBE else "eval-zeroshot"
        if command != settings.command:
            raise ClipcidError(
                f"{path} is a result of {command}, and {settings.command} compares its own.",
                f"Compare results of one evaluation: clipcid {command} --compare A.json B.json",
            )


def _folder_error(folder: Path, work: WorkDirectory, command: str) -> ClipcidError:
    """Return the error for a model's folder in place of a metrics file, which names the metrics files of that model."""
    files = list[str]()
    for path in sorted(work.eval.glob("*.json")):
        with suppress(ClipcidError):  # not ours, or damaged
            if Path(str(read_metrics(path).pretrained)).resolve().is_relative_to(folder.resolve()):
                files.append(str(path))
    fix = f"Measure the model first: {command} MODEL DATA --predictions"
    if files:
        fix = "Give one of its metrics files:\n" + "\n".join(f"  {file}" for file in files[:_NAMED])
    return ClipcidError(f"{folder} is a folder; --compare takes two metrics files.", fix)


def _missing_error(path: Path, work: WorkDirectory, command: str) -> ClipcidError:
    """Return the error for a metrics file that is not there, which names those of close names, beside it or in eval/."""
    files = [*path.parent.glob("*.json"), *work.eval.glob("*.json")]
    by_name = {file.stem: file for file in files}  # of two of one name that of the work directory
    near = get_close_matches(path.name.removesuffix(".json"), by_name, n=3)
    fix = f"Measure the model first: {command} MODEL DATA --predictions"
    if near:
        fix = "Did you mean one of these?\n" + "\n".join(f"  {by_name[name]}" for name in near)
    elif next(work.eval.glob("*.json"), None) is not None:
        fix = f"Those of this work directory are in {work.eval}."
    return ClipcidError(f"There is no metrics file {path}.", fix)
