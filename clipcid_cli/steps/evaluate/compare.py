"""`--compare A B` of both evaluations: is the difference of two results larger than the choice of images explains?

Where A and B are several seeds each, patterns or lists of files, the choice of seeds counts too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K, compare_accuracies, precision_metrics
from clipcid_cli.algorithms.metrics.intervals import MIN_SEEDS, Array, PairedMetric, compare
from clipcid_cli.algorithms.metrics.retrieval import Ranks, compare_retrieval
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import match_pattern
from clipcid_cli.formats.results.metrics import (
    ASSOCIATION,
    CLASSIFICATION,
    LINEAR_PROBE,
    MULTI_LABEL,
    RETRIEVAL,
    EvaluationSidecar,
    Metrics,
    Predictions,
    predictions_path,
    read_metrics,
    read_predictions,
    validate_unchanged_metrics,
)
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.comparison import ComparedLines, ComparisonResult, Difference
from clipcid_cli.steps.evaluate.draws import Draws
from clipcid_cli.steps.settings.comparing import ComparingSettings

# Metrics files that an error names.
_NAMED = 8


def compare_results(settings: ComparingSettings) -> ComparisonResult:
    """Compare two results on the same images, or several pairs of them."""
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
    truth = predictions[0]
    for other in predictions[1:]:
        _validate_same_data(truth, other, command)
    num_seeds = len(sides[0])
    if num_seeds != len(sides[1]):
        raise ClipcidError(
            f"Seeds are compared in pairs, but A has {num_seeds:,} metrics files and B has {len(sides[1]):,}.",
            f"Give the same number of each, in the same order of seeds, or list some with commas: {command} --compare "
            "A1.json,A2.json B1.json,B2.json",
        )
    files = [str(path) for path in paths]
    models = [side.model for side in predictions]
    is_pair = num_seeds == 1
    names = _tell_apart(records, files) if is_pair else ["A", "B"]
    has_prompts = records[0].task != LINEAR_PROBE and truth.kind != RETRIEVAL
    prompts = _compare_prompts(sidecars, names if is_pair else files) if has_prompts else None
    metrics = _compare(predictions[:num_seeds], predictions[num_seeds:], settings)
    if records[0].task == LINEAR_PROBE:
        metrics = {f"lp_{name}": metric for name, metric in metrics.items()}
    differences = {name: _judge(name, metric, names) for name, metric in metrics.items()}
    if settings.margin is not None:
        for judged in differences.values():
            _judge_by_margin(judged, settings.margin, names)
    for judged in differences.values():
        reporting.note(judged.verdict)
    if is_pair and models[0] != models[1]:
        reporting.note(
            "This compares two checkpoints, not two methods: for methods, give several seeds of each, trained as long as "
            "you mean to train."
        )
    return ComparisonResult(
        compared=files if is_pair else [files[:num_seeds], files[num_seeds:]],
        models=models if is_pair else [models[:num_seeds], models[num_seeds:]],
        dataset=truth.dataset,
        images=len(truth),
        prompts=prompts,
        differences=differences,
        files={},
        margin=settings.margin,
    )


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


def _validate_same_data(first: Predictions, second: Predictions, command: str) -> None:
    fix = f"Compare results of the same data set: run {command} --predictions for both models on it."
    if ASSOCIATION in (first.kind, second.kind):
        raise ClipcidError("--compare compares no associations.", "Compare the metrics files themselves.")
    if first.kind != second.kind:
        raise ClipcidError(f"One result is of {first.kind}, the other of {second.kind}.", fix)
    if not np.array_equal(first.keys, second.keys):
        common = len(np.intersect1d(first.keys, second.keys))
        raise ClipcidError(
            f"The results are of different images: {len(first):,} of {first.dataset}, {len(second):,} of "
            f"{second.dataset}, {common:,} in both.",
            fix,
        )
    if not first.has_truth_of(second):
        classes = f"classes ({first.num_classes} and {second.num_classes}, or in another order)"
        other = "captions" if first.kind == RETRIEVAL else classes
        raise ClipcidError(f"The results are of the same images with different {other}.", fix)


def _compare_prompts(sidecars: list[EvaluationSidecar | None], names: list[str]) -> dict[str, ComparedLines] | None:
    """Tell whether all results are of the same class names and templates; warn where they are not, or nothing says so."""
    recorded = [None if sidecar is None else sidecar.prompts for sidecar in sidecars]
    prompts = [lines for lines in recorded if lines is not None]
    if len(prompts) < len(recorded):
        without = " and ".join(name for name, lines in zip(names, recorded, strict=True) if lines is None)
        reporting.warn(
            f"No entry `prompts` records the class names and templates of {without}: they may not be the same. Results "
            "of this version of eval-zeroshot have one."
        )
        return None
    labels = ["A", "B"] if len(names) == 2 else names
    compared = {}
    for kind, first in prompts[0].items():
        different = [index for index, lines in enumerate(prompts) if lines[kind].hash != first.hash]
        index = different[0] if different else len(prompts) // 2  # the first that differs, else the first of B
        second = prompts[index][kind]
        compared[kind] = ComparedLines(first, second, same=not different)
        if different:
            reporting.warn(
                f"The {kind.replace('_', ' ')} differ, so the scores differ by more than the models: of {labels[0]} "
                f"{first}; of {labels[index]} {second}."
            )
    return compared


def _compare(
    first: Sequence[Predictions], second: Sequence[Predictions], settings: ComparingSettings
) -> dict[str, PairedMetric]:
    """Compare the predictions of both sides, one or more of each."""
    replicates = settings.bootstrap
    seed = settings.seed
    truth = first[0]
    if truth.kind == CLASSIFICATION:
        ranks, other_ranks = ([_class_ranks(predictions) for predictions in side] for side in (first, second))
        return compare_accuracies(truth.column("label"), ranks, other_ranks, truth.num_classes, replicates, seed)
    if truth.kind == MULTI_LABEL:
        metrics, others = (
            [precision_metrics(predictions.matrix("class_scores"), truth.positive) for predictions in side]
            for side in (first, second)
        )
        return compare(metrics, others, replicates, seed)
    recalls, other_recalls = ([_retrieval_ranks(predictions) for predictions in side] for side in (first, second))
    captions = torch.from_numpy(truth.lengths("image_ranks"))
    image_of_text = torch.repeat_interleave(torch.arange(len(captions)), captions)
    return compare_retrieval(recalls, other_recalls, image_of_text, replicates, seed)


def _retrieval_ranks(predictions: Predictions) -> Ranks:
    return torch.from_numpy(predictions.flat("image_ranks")), torch.from_numpy(predictions.column("text_rank"))


def _class_ranks(predictions: Predictions) -> Array:
    """Return how many classes come before the right one, int64 [N], as far as metrics ask: 1 for 1 … 4, 5 for more."""
    label = predictions.column("label")
    among = (predictions.matrix("top") == label[:, None]).any(axis=1)
    return np.where(predictions.column("predicted") == label, 0, np.where(among, 1, ACCURACY_TOP_K))


def _judge(name: str, metric: PairedMetric, names: list[str]) -> Difference:
    """State a difference in numbers and in words."""
    difference, (low, high) = metric.difference, metric.interval
    better, worse = (1, 0) if difference > 0 else (0, 1)
    numbers = f"{100 * difference:+.2f} points, 95 % interval {100 * low:+.2f} … {100 * high:+.2f}"
    if metric.p_value is not None:
        numbers += f", McNemar p = {metric.p_value:.2g}"
    if metric.is_significant:
        verdict = f"{name}: {names[better]} is better than {names[worse]}, and the difference is real ({numbers})."
    elif not metric.has_enough_seeds:
        seeds = f"{len(metric.first)} seeds of each are too few, give at least {MIN_SEEDS}"
        verdict = f"{name}: no verdict, {seeds} ({numbers})."
    elif difference == 0 and not metric.excludes_zero:
        verdict = f"{name}: no difference ({numbers})."
    else:
        verdict = f"{name}: {names[better]} scores higher, but the difference may be due to chance ({numbers})."
    return Difference(
        first=_summarise(metric.first),
        second=_summarise(metric.second),
        difference=difference,
        interval=metric.interval,
        p_value=metric.p_value,
        real=metric.is_significant,
        enough_seeds=metric.has_enough_seeds,
        verdict=verdict,
    )


def _judge_by_margin(judged: Difference, margin: float, names: list[str]) -> None:
    """Add whether either side loses less than a margin, in points: its whole interval is above it."""
    if not judged.enough_seeds:
        return
    low, high = (100 * end for end in judged.interval)
    judged.no_worse = low > -margin
    judged.equivalent = judged.no_worse and high < margin
    first, second = names
    points = f"{margin:g} point{'' if margin == 1 else 's'}"
    if judged.equivalent:
        verdict = f"{first} and {second} are equivalent within {points}"
    elif judged.no_worse:
        verdict = f"{second} is no worse than {first} by {points}"
    elif high < margin:
        verdict = f"{first} is no worse than {second} by {points}"
    else:
        verdict = f"neither is shown to be no worse than the other by {points}"
    judged.verdict += f" With the margin, {verdict}."


def _summarise(values: list[float]) -> float | Draws:
    """Return the only value; of several seeds the values with their mean and standard deviation."""
    return values[0] if len(values) == 1 else Draws.from_values(values)


def _tell_apart(records: list[Metrics], files: list[str]) -> list[str]:
    """Name both results by their models; where those have one name, by weights, and else by files."""
    called = [[str(getattr(record, field)) for record in records] for field in ("model", "pretrained")]
    first, second = next((pair for pair in called if pair[0] != pair[1]), files)
    return [f"A ({first})", f"B ({second})"]
