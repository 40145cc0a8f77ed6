"""`--compare A B` of both evaluations: is the difference of two results larger than the choice of images explains?

Where A and B are several seeds each, patterns or lists of files, the choice of seeds counts too. Where they are of several
data sets, so does the mean over these.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K, compare_accuracies, precision_metrics
from clipcid_cli.algorithms.metrics.intervals import MIN_SEEDS, Array, PairedMetric, compare, compare_means
from clipcid_cli.algorithms.metrics.retrieval import Ranks, compare_retrieval
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import RECALL, customary_metric
from clipcid_cli.formats.results.metrics import (
    ASSOCIATION,
    CLASSIFICATION,
    LINEAR_PROBE,
    MULTI_LABEL,
    RETRIEVAL,
    EvaluationSidecar,
    Metrics,
    Predictions,
)
from clipcid_cli.records import Draws
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.compared import Result, read_sides
from clipcid_cli.steps.evaluate.comparison import (
    ComparedLines,
    Comparison,
    ComparisonResult,
    ComparisonResults,
    Difference,
    MeanDifference,
)
from clipcid_cli.steps.evaluate.image_groups import find_groups, refuse_groups_of_several
from clipcid_cli.steps.settings.comparing import ComparingSettings


def compare_results(settings: ComparingSettings) -> Comparison:
    """Compare two results on the same images, or several pairs of them: of seeds, of data sets, or of both."""
    sides = read_sides(settings)
    datasets = [list(dict.fromkeys(result.dataset for result in side)) for side in sides]
    if max(map(len, datasets)) > 1:
        return _compare_datasets(sides, datasets, settings)
    answer, _ = _compare_sides(sides, settings)
    for judged in answer.differences.values():
        reporting.note(judged.verdict)
    _note_checkpoints(answer)
    return answer


def _compare_datasets(
    sides: list[list[Result]], datasets: list[list[str]], settings: ComparingSettings
) -> ComparisonResults:
    """Compare both sides on each data set, and on the mean over those of one task."""
    refuse_groups_of_several(settings, datasets[0])
    for side, there, other in (("A", *datasets), ("B", *reversed(datasets))):
        lacking = [dataset for dataset in other if dataset not in there]
        if lacking:
            raise ClipcidError(
                f"{side} has no result on {', '.join(lacking)}.",
                "Give results of both sides on the same data sets, or compare one data set at a time.",
            )
    answers = list[ComparisonResult]()
    counted: dict[str, dict[str, tuple[str, PairedMetric]]] = {}
    for dataset in datasets[0]:
        own = [[result for result in side if result.dataset == dataset] for side in sides]
        answer, metrics = _compare_sides(own, settings)
        if answers and answer.models != answers[0].models:
            raise ClipcidError(
                f"The models on {dataset} are not those on {answers[0].dataset}: {answer.models} and {answers[0].models}.",
                "Give the results of the same models, in the same order, on every data set.",
            )
        answers.append(answer)
        name = _customary(dataset, own[0][0], list(metrics))
        counted.setdefault(own[0][0].metrics.task, {})[dataset] = (name, metrics[name])
    means = [_average(task, of_task, settings) for task, of_task in counted.items() if len(of_task) > 1]
    for mean in means:
        reporting.note(mean.verdict)
    _note_checkpoints(answers[0])
    return ComparisonResults(answers, means, settings.margin, {})


def _customary(dataset: str, result: Result, metrics: list[str]) -> str:
    """Return the metric that a data set is usually reported by, among those that are compared."""
    if result.predictions.kind == RETRIEVAL:
        return RECALL
    return result.prefix + customary_metric(dataset, [name.removeprefix(result.prefix) for name in metrics])


def _average(task: str, counted: dict[str, tuple[str, PairedMetric]], settings: ComparingSettings) -> MeanDifference:
    metric = compare_means([metric for _, metric in counted.values()], settings.bootstrap, settings.seed)
    judged = _judge(f"mean over {', '.join(counted)}", metric, ["A", "B"], settings.margin)
    names = {dataset: name for dataset, (name, _) in counted.items()}
    return MeanDifference(**msgspec.structs.asdict(judged), task=task, counted=names)


def _compare_sides(
    sides: list[list[Result]], settings: ComparingSettings
) -> tuple[ComparisonResult, dict[str, PairedMetric]]:
    """Compare both sides on one data set; return also the metrics behind the answer."""
    command = f"clipcid {settings.command}"
    results = [*sides[0], *sides[1]]
    predictions = [result.predictions for result in results]
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
    files = [str(result.path) for result in results]
    models = [side.model for side in predictions]
    is_pair = num_seeds == 1
    records = [result.metrics for result in results]
    names = _tell_apart(records, files) if is_pair else ["A", "B"]
    has_prompts = records[0].task != LINEAR_PROBE and truth.kind != RETRIEVAL
    sidecars = [result.sidecar for result in results]
    prompts = _compare_prompts(sidecars, names if is_pair else files) if has_prompts else None
    groups = find_groups(truth.keys.tolist(), truth.dataset, settings)
    compared = _compare(predictions[:num_seeds], predictions[num_seeds:], groups, settings)
    metrics = {results[0].prefix + name: metric for name, metric in compared.items()}
    answer = ComparisonResult(
        compared=files if is_pair else [files[:num_seeds], files[num_seeds:]],
        models=models if is_pair else [models[:num_seeds], models[num_seeds:]],
        dataset=truth.dataset,
        images=len(truth),
        groups=None if groups is None else int(groups.max()) + 1,
        prompts=prompts,
        differences={name: _judge(name, metric, names, settings.margin) for name, metric in metrics.items()},
        files={},
        margin=settings.margin,
    )
    return answer, metrics


def _note_checkpoints(answer: ComparisonResult) -> None:
    first, second = answer.models
    if isinstance(first, str) and first != second:
        reporting.note(
            "This compares two checkpoints, not two methods: for methods, give several seeds of each, trained as long as "
            "you mean to train."
        )


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
    first: Sequence[Predictions], second: Sequence[Predictions], groups: Array | None, settings: ComparingSettings
) -> dict[str, PairedMetric]:
    """Compare the predictions of both sides, one or more of each."""
    replicates = settings.bootstrap
    seed = settings.seed
    truth = first[0]
    if truth.kind == CLASSIFICATION:
        ranks, other_ranks = ([_class_ranks(predictions) for predictions in side] for side in (first, second))
        labels = truth.column("label")
        return compare_accuracies(labels, ranks, other_ranks, truth.num_classes, replicates, seed, groups)
    if truth.kind == MULTI_LABEL:
        metrics, others = (
            [precision_metrics(predictions.matrix("class_scores"), truth.positive) for predictions in side]
            for side in (first, second)
        )
        return compare(metrics, others, replicates, seed, groups_N=groups)
    ranks_of_first, ranks_of_second = (
        [_retrieval_ranks(predictions) for predictions in side] for side in (first, second)
    )
    captions = torch.from_numpy(truth.lengths("image_ranks"))
    image_of_text = torch.repeat_interleave(torch.arange(len(captions)), captions)
    return compare_retrieval(ranks_of_first, ranks_of_second, image_of_text, replicates, seed, groups)


def _retrieval_ranks(predictions: Predictions) -> Ranks:
    return torch.from_numpy(predictions.flat("image_ranks")), torch.from_numpy(predictions.column("text_rank"))


def _class_ranks(predictions: Predictions) -> Array:
    """Return how many classes come before the right one, int64 [N], as far as metrics ask: 1 for 1 … 4, 5 for more."""
    label = predictions.column("label")
    among = (predictions.matrix("top") == label[:, None]).any(axis=1)
    return np.where(predictions.column("predicted") == label, 0, np.where(among, 1, ACCURACY_TOP_K))


def _judge(name: str, metric: PairedMetric, names: list[str], margin: float | None) -> Difference:
    """State a difference in numbers and in words, and what a margin in points makes of it."""
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
    judged = Difference(
        first=_summarise(metric.first),
        second=_summarise(metric.second),
        difference=difference,
        interval=metric.interval,
        p_value=metric.p_value,
        real=metric.is_significant,
        enough_seeds=metric.has_enough_seeds,
        verdict=verdict,
    )
    if margin is not None:
        _judge_by_margin(judged, margin, names)
    return judged


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
