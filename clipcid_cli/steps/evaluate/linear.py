"""`eval-linear`: frozen features of all splits → logistic regression, C chosen on held-out images → metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K
from clipcid_cli.algorithms.near.repeated import find_repeated
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import Output, OutputSpec, find_output, other_run_error
from clipcid_cli.formats.results.evaluations import LinearSidecar
from clipcid_cli.formats.results.features import ImageFeatures
from clipcid_cli.formats.results.metrics import (
    LINEAR_PROBE,
    predictions_path,
    read_metrics,
    skipped_path,
    write_metrics,
    write_predictions,
)
from clipcid_cli.formats.skipped import make_table, write_skipped
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.evaluate.features import extract_features
from clipcid_cli.steps.evaluate.image_groups import find_groups
from clipcid_cli.steps.evaluate.model import EvaluatedModel, warn_of_skips
from clipcid_cli.steps.evaluate.predictions import lacks_predictions, wants_predictions
from clipcid_cli.steps.evaluate.probe_fits import ProbeFits, describe_fits, guess_labels
from clipcid_cli.steps.evaluate.probe_plan import ProbePlan, make_plan
from clipcid_cli.steps.evaluate.probe_result import LinearResult, Sweep
from clipcid_cli.steps.evaluate.result import Preview
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.evaluate.comparison import Comparison

# What the probe itself does not depend on: what is measured beside it, and its intervals.
_BESIDE = frozenset({"shots", "shot_repeats", "knn"})
_MAY_DIFFER = _BESIDE | {"bootstrap", "groups"}


def run(settings: EvalLinearSettings) -> LinearResult | Preview | Comparison:
    """Fit and measure a linear probe. ``--compare`` compares two earlier results."""
    if settings.compare:
        from clipcid_cli.steps.evaluate.compare import compare_results  # it measures nothing

        return compare_results(settings)
    with open_dist_context(settings.device) as context:
        plan = context.on_rank0(make_plan, settings)
        for task in plan.splits.values():
            validate_samples(task.dataset, context, settings, dry_run=settings.dry_run)
        if settings.dry_run:
            return _preview(plan, context)
        return _evaluate(plan, EvaluatedModel(plan.name, context, settings))


def _preview(plan: ProbePlan, context: DistContext) -> Preview:
    usable = None
    if context.on_rank0(plan.path.exists):  # else the data need not be hashed
        _, spec = _identify(plan, EvaluatedModel(plan.name, context, plan.settings))
        usable = context.on_rank0(lambda: _find_usable(plan, find_output(spec)))
    if usable is None:
        reporting.note(f"Would fit {plan.name.spec} on {plan.splits['train'].dataset.spec} and write {plan.path}.")
    return Preview(plan.dataset, plan.name.spec, LINEAR_PROBE, {"metrics": str(plan.path)}, reused=usable is not None)


def _evaluate(plan: ProbePlan, model: EvaluatedModel) -> LinearResult:
    path = plan.path
    context = model.context
    data, spec = _identify(plan, model)
    with claim_output(context, spec) as output:

        def find_result() -> LinearResult | None:
            usable = _find_usable(plan, output)
            return None if usable is None else _make_result(usable, path, reused=True)

        result = context.on_rank0(find_result)
        if result is not None:
            return result
        seconds: dict[str, float] = {}
        with timed(seconds, "encode"):
            features = {split: extract_features(model, task, data[split]) for split, task in plan.splits.items()}
        return context.on_rank0(_write, plan, model, features, seconds, output)


def _identify(plan: ProbePlan, model: EvaluatedModel) -> tuple[dict[str, list[FileRecord]], OutputSpec[LinearSidecar]]:
    """Return the fingerprints of each split, and what decides the output."""
    data = model.context.on_rank0(lambda: {split: task.fingerprints() for split, task in plan.splits.items()})
    inputs = [file for records in data.values() for file in records]
    return data, model.specify(plan.path, LinearSidecar, plan.identity, inputs, _MAY_DIFFER)


def _find_usable(plan: ProbePlan, output: Output[LinearSidecar]) -> LinearSidecar | None:
    """Find an earlier probe that answers the question, and say so; refuse to replace one with more than is asked for."""
    if not plan.path.is_file():
        return None
    usable = _find_answer(plan, output)
    if usable is None:
        _validate_kept(plan, output)
    return usable


def _find_answer(plan: ProbePlan, output: Output[LinearSidecar]) -> LinearSidecar | None:
    """Find an earlier probe with all metrics, few-shot curves and nearest neighbours that are asked for, and say so."""
    usable = output.finished
    earlier = output.earlier
    if earlier is not None and output.differences.keys() <= {f"settings.{name}" for name in _BESIDE}:
        usable = None if _find_lacking(earlier.settings, plan.identity) else earlier
    if usable is None:
        return None
    what = f"{plan.name.spec} on {plan.dataset}"
    measured = read_metrics(plan.path).metrics
    names = [f"lp_{name}" for name in plan.splits["test"].metric_names]
    missing = [name for name in names if name not in measured]
    if missing:  # of a version that did not know them
        reporting.note(f"{plan.path} has no {', '.join(missing)}; measuring {what} again.")
        return None
    if lacks_predictions(plan.path, what, plan.settings):
        return None
    reporting.note(f"{plan.path} already holds {what}.")
    return usable


def _validate_kept(plan: ProbePlan, output: Output[LinearSidecar]) -> None:
    """Refuse to measure a probe again without the few-shot curve or the nearest neighbours that the earlier one has."""
    if output.earlier is None or plan.settings.overwrite:
        return
    lost = [f"settings.{name}" for name in _find_lacking(plan.identity, output.earlier.settings)]
    if lost:
        differences = {name: output.differences[name] for name in lost}
        raise other_run_error(f"{plan.path} holds a linear probe", differences)


def _find_lacking(has: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Name the settings of few-shot curves and nearest neighbours of which `has` lacks something that is asked for."""
    lacking = [
        name for name in ("shots", "knn") if any(count not in _counts(has, name) for count in _counts(asked, name))
    ]
    both = _counts(has, "shots") and _counts(asked, "shots")
    if both and has.get("shot_repeats") != asked.get("shot_repeats"):
        lacking.append("shot_repeats")
    return lacking


def _counts(settings: dict[str, Any], name: str) -> list[Any]:
    """Return the counts of a setting; none where a sidecar, which anyone can edit, holds something else."""
    counts = settings.get(name)
    return counts if isinstance(counts, list) else []


def _write(
    plan: ProbePlan,
    model: EvaluatedModel,
    features: dict[str, ImageFeatures],
    seconds: dict[str, float],
    output: Output[LinearSidecar],
) -> LinearResult:
    """Fit the probe on the features of all splits, measure it, and write its files."""
    for split, own in features.items():
        warn_of_skips(plan.splits[split].name, own.skips)
    images = {split: own.to(model.context.device) for split, own in features.items()}
    test = images["test"]
    repeated = warn_of_repeats(images)
    with timed(seconds, "sweep"):
        fits = ProbeFits(images, plan)
        points, best = fits.sweep()
    with timed(seconds, "refit"):
        solution = fits.refit(best)
        of_images = fits.measure(solution.classifier, test)
        measured = of_images.values()
        groups = find_groups(test.keys, plan.dataset, plan.settings)
        draws = dataclasses.replace(of_images, groups_N=groups)
        intervals = draws.intervals(plan.settings.bootstrap, plan.settings.seed)
    if "acc5" in measured and len(plan.classes) < ACCURACY_TOP_K:
        reporting.note(f"lp_acc5 is null because there are only {len(plan.classes)} classes.")
    with timed(seconds, "shots"):
        shots = fits.few_shots(test)
    with timed(seconds, "neighbors"):
        neighbours = fits.measure_neighbours(test)
    probe = {f"lp_{name}": value for name, value in measured.items()}
    guessed, majority = guess_labels(test.labels, len(plan.classes))
    output.begin_work()
    written = output.work_top / plan.path.name
    write_metrics(written, model.make_metrics(plan.dataset, LINEAR_PROBE, probe | neighbours))
    outputs = [written]
    if wants_predictions(output, plan.path, plan.settings):
        predictions = output.work / predictions_path(plan.path).name
        columns = {"key": test.keys, **fits.columns(solution.classifier, test)}
        kind = plan.splits["test"].kind
        write_predictions(predictions, kind, model.model.info.slug, plan.dataset, len(plan.classes), columns)
        outputs.append(predictions)
    skipped = output.work / skipped_path(plan.path).name
    if write_skipped(skipped, [make_table(own.skips.listed) for own in features.values()]):
        outputs.append(skipped)
    counts = {
        "images": len(test),
        "train_images": len(fits.images),
        "validation_images": fits.num_held_out,
        "repeated_images": repeated,
        "skipped": {split: own.skips.counts for split, own in features.items()},
    }
    result = {
        "intervals": {f"lp_{name}": bounds for name, bounds in intervals.items()},
        "groups": None if groups is None else int(groups.max()) + 1,
        "metric": plan.metric,
        "c": best.c,
        "folds": len(fits.folds),
        "validation_score": best.score,
        "sweep": Sweep([point.c for point in points], [point.score for point in points]),
        "shots": shots,
        "chance": {name: guessed[short] for name in probe | neighbours if (short := name.partition("_")[2]) in guessed},
        "majority": majority,
        "classes": len(plan.classes),
        **counts,
    }
    sidecar = output.commit(
        counts=counts,
        seconds=seconds,
        outputs=[record(file, output.work) for file in outputs],
        result=result,
        solution=describe_fits([solution]),
        sweep=[{"c": point.c, "validation_score": point.score, **describe_fits(point.solutions)} for point in points],
    )
    return _make_result(sidecar, plan.path, reused=False)


def warn_of_repeats(images: dict[str, ImageFeatures]) -> int:
    """Count test images that the probe has seen, with a warning; by their embeddings, since splits number keys alike."""
    test = images["test"].rows
    seen = [find_repeated(test, own.rows) for split, own in images.items() if split != "test"]
    repeated = int(torch.stack(seen).any(dim=0).sum())
    if repeated:
        reporting.warn(
            f"{repeated:,} of {len(test):,} test images are among those of training too, by their embeddings: the result "
            "flatters the model. Leave them out of one split."
        )
    return repeated


def _make_result(sidecar: LinearSidecar, path: Path, *, reused: bool) -> LinearResult:
    content = msgspec.structs.asdict(read_metrics(path)) | sidecar.result
    beside = {"predictions": predictions_path(path), "skipped": skipped_path(path)}
    files = {"metrics": str(path)} | {name: str(file) for name, file in beside.items() if file.is_file()}
    content |= {"seconds": sidecar.seconds, "files": files, "reused": reused}
    return msgspec.convert(content, LinearResult)
