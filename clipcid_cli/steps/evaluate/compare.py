"""`eval-zeroshot --compare A B`: is the difference of two results larger than the choice of images explains?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K, compare_accuracies, precision_metrics
from clipcid_cli.algorithms.metrics.intervals import Array, PairedMetric, compare
from clipcid_cli.algorithms.metrics.retrieval import compare_recalls
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.metrics import (
    CLASSIFICATION,
    MULTI_LABEL,
    RETRIEVAL,
    Metrics,
    Predictions,
    predictions_path,
    read_metrics,
    read_predictions,
    validate_unchanged_metrics,
)
from clipcid_cli.formats.sidecar import EvaluationSidecar
from clipcid_cli.steps.evaluate.result import ComparedLines, ComparisonResult, Difference
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


def compare_results(settings: EvalZeroshotSettings, reporter: Reporter) -> ComparisonResult:
    """Compare two results on the same images."""
    paths = settings.compared
    again = "Run eval-zeroshot --predictions --overwrite for that model and data set again."
    sidecars = [validate_unchanged_metrics(path, again) for path in paths]
    records = [read_metrics(path) for path in paths]
    first, second = (read_predictions(predictions_path(path)) for path in paths)
    _validate_same_data(first, second)
    names = _tell_apart(records, paths)
    prompts = None if first.kind == RETRIEVAL else _compare_prompts(sidecars, names, reporter)
    differences = {name: _judge(name, metric, names) for name, metric in _compare(first, second, settings).items()}
    for judged in differences.values():
        reporter.note(judged.verdict)
    return ComparisonResult(
        compared=[str(path) for path in paths],
        models=[first.model, second.model],
        dataset=first.dataset,
        images=len(first),
        prompts=prompts,
        differences=differences,
        files={},
    )


def _validate_same_data(first: Predictions, second: Predictions) -> None:
    fix = "Compare results of the same data set: run eval-zeroshot --predictions for both models on it."
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
        raise ClipcidError(f"The results are of the same images with other {other}.", fix)


def _compare_prompts(
    sidecars: list[EvaluationSidecar | None], names: list[str], reporter: Reporter
) -> dict[str, ComparedLines] | None:
    """Tell whether both results are of the same class names and templates; warn where they are not, or nothing says so."""
    first, second = (None if sidecar is None else sidecar.prompts for sidecar in sidecars)
    if first is None or second is None:
        without = " and ".join(name for name, found in zip(names, (first, second), strict=True) if found is None)
        reporter.warn(
            f"No entry `prompts` records the class names and templates of {without}: they may not be the same. Results "
            "of this version of eval-zeroshot have one."
        )
        return None
    compared = {}
    for kind, one in first.items():
        compared[kind] = ComparedLines(one, second[kind], one.hash == second[kind].hash)
        if not compared[kind].same:
            reporter.warn(
                f"The {kind.replace('_', ' ')} differ, so the scores differ by more than the models: of A {one}; of B "
                f"{second[kind]}."
            )
    return compared


def _compare(first: Predictions, second: Predictions, settings: EvalZeroshotSettings) -> dict[str, PairedMetric]:
    replicates = settings.bootstrap
    seed = settings.seed
    if first.kind == CLASSIFICATION:
        one, other = (_ranks(side) for side in (first, second))
        return compare_accuracies(first.column("label"), one, other, first.num_classes, replicates, seed)
    if first.kind == MULTI_LABEL:
        metrics, others = (precision_metrics(side.matrix("class_scores"), first.positive) for side in (first, second))
        return compare(metrics, others, replicates, seed)
    ranks, other_ranks = (
        (torch.from_numpy(side.flat("image_ranks")), torch.from_numpy(side.column("text_rank")))
        for side in (first, second)
    )
    captions = torch.from_numpy(first.lengths("image_ranks"))
    image_of_text = torch.repeat_interleave(torch.arange(len(captions)), captions)
    return compare_recalls(ranks, other_ranks, image_of_text, replicates, seed)


def _ranks(found: Predictions) -> Array:
    """Return how many classes come before the right one, int64 [N], as far as metrics ask: 1 for 1 … 4, 5 for more."""
    label = found.column("label")
    among = (found.matrix("top") == label[:, None]).any(axis=1)
    return np.where(found.column("predicted") == label, 0, np.where(among, 1, ACCURACY_TOP_K))


def _judge(name: str, metric: PairedMetric, names: list[str]) -> Difference:
    """State a difference in numbers and in words."""
    difference, (low, high) = metric.difference, metric.interval
    better, worse = (1, 0) if difference > 0 else (0, 1)
    numbers = f"{100 * difference:+.2f} points, 95 % interval {100 * low:+.2f} … {100 * high:+.2f}"
    if metric.p_value is not None:
        numbers += f", McNemar p = {metric.p_value:.2g}"
    if metric.is_significant:
        verdict = f"{name}: {names[better]} is better than {names[worse]}, and the difference is real ({numbers})."
    elif difference == 0 and not metric.excludes_zero:
        verdict = f"{name}: no difference ({numbers})."
    else:
        verdict = f"{name}: {names[better]} scores higher, but so small a difference can be chance ({numbers})."
    return Difference(**vars(metric), difference=difference, real=metric.is_significant, verdict=verdict)


def _tell_apart(records: list[Metrics], paths: tuple[Path, Path]) -> list[str]:
    """Name both results by their models; where those have one name, by weights, and else by files."""
    called = [[str(getattr(record, field)) for record in records] for field in ("model", "pretrained")]
    first, second = next((pair for pair in called if pair[0] != pair[1]), [str(path) for path in paths])
    return [f"A ({first})", f"B ({second})"]
