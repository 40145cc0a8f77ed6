"""`eval-linear`: frozen features of all splits → logistic regression, C chosen on held-out images → metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import torch

from clipcid_cli.algorithms.metrics.chance import guess_classes, guess_order, largest_class
from clipcid_cli.algorithms.metrics.classification import (
    ACCURACY_TOP_K,
)
from clipcid_cli.algorithms.probe import (
    PROMISED_DECREASE,
    TOLERANCE,
    Solution,
    regularisation_grid,
)
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.features import Features, features_path, read_features, write_features
from clipcid_cli.formats.results.metrics import (
    read_metrics,
    skipped_path,
    write_metrics,
)
from clipcid_cli.formats.sidecar import LinearSidecar
from clipcid_cli.formats.skipped import make_table, write_skipped
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.model import EvaluatedModel, warn_of_skips
from clipcid_cli.steps.evaluate.probe_fits import ProbeFits
from clipcid_cli.steps.evaluate.probe_plan import TASK, ProbePlan, make_plan
from clipcid_cli.steps.evaluate.probe_result import LinearResult, Sweep
from clipcid_cli.steps.evaluate.result import Preview
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

# The probe itself does not depend on them.
_MAY_DIFFER = frozenset({"shots", "shot_repeats", "knn"})


def run(settings: EvalLinearSettings) -> LinearResult | Preview:
    """Fit and measure a linear probe."""
    with open_dist_context(settings.device) as context:
        plan = context.on_rank0(lambda: make_plan(settings))
        for task in plan.splits.values():
            validate_samples(task.dataset, context, settings, dry_run=settings.dry_run)
        if settings.dry_run:
            reporting.note(f"Would fit {plan.name.spec} on {plan.splits['train'].dataset.spec} and write {plan.path}.")
            return Preview(plan.dataset, plan.name.spec, TASK, {"metrics": str(plan.path)})
        return _evaluate(plan, EvaluatedModel(plan.name, context, settings))


def _evaluate(plan: ProbePlan, model: EvaluatedModel) -> LinearResult:
    path = plan.path
    context = model.context
    data = context.on_rank0(lambda: {split: task.fingerprints() for split, task in plan.splits.items()})
    inputs = [file for records in data.values() for file in records]
    with model.claim(path, LinearSidecar, _identity(plan), inputs, _MAY_DIFFER) as output:
        # An earlier probe that also has a few-shot curve, or nearest neighbours, answers the question without them.
        more = plan.settings.shot_counts or plan.settings.neighbour_counts
        usable = output.finished if more else output.finished or output.earlier

        def find_result() -> LinearResult | None:
            if usable is None or not path.is_file():
                return None
            reporting.note(f"{path} already holds {model.name.spec} on {plan.dataset}.")
            return _make_result(usable, path, reused=True)

        result = context.on_rank0(find_result)
        if result is not None:
            return result
        seconds: dict[str, float] = {}
        with timed(seconds, "encode"):
            features = {split: extract_features(model, task, data[split]) for split, task in plan.splits.items()}
        return context.on_rank0(lambda: _write(plan, model, features, seconds, output))


def extract_features(model: EvaluatedModel, task: ZeroshotTask, data: list[FileRecord]) -> Features:
    """Return a model's features of the split with the fingerprints `data`, which are kept for later runs."""
    info = model.model.info
    context = model.context
    identity = {
        "weights": info.weights_hash,
        "config": info.config,
        "preprocess": info.preprocess_hash,
        "data": [[file.size, file.hash] for file in data],
        "keys": task.dataset.keys,
        "columns": dataclasses.asdict(task.dataset.columns),
        "labels": task.label_of,
        "classes": len(task.class_names),
        "precision": model.precision.name,
        "batch_size": model.batch_size,
        "skipped": "listed",  # which earlier files lack
    }
    path = features_path(WorkDirectory(model.settings.work).features, info.slug, identity)
    kept = context.on_rank0(lambda: read_features(path))
    if kept is None and path.exists():
        reporting.warn(f"{path} is damaged: the features of {task.name} are computed again.")
    if kept is not None:
        reporting.note(f"{task.name}: features of {len(kept):,} images from {path}.")
        context.on_rank0(lambda: model.validate_usable(task, len(kept) + kept.skips.total, len(kept), kept.skips))
        return kept
    rows = model.encode(task)
    features = context.on_all(lambda: Features(rows.encoded.rows[Kind.IMAGES], rows.labels, rows.skips))
    context.on_rank0(lambda: write_features(path, features))
    return features


def _identity(plan: ProbePlan) -> dict[str, Any]:
    """Return the settings by which a finished probe is recognised."""
    settings = plan.settings
    return {
        "dataset": plan.dataset,
        "classes": list(plan.classes),
        "val_fraction": None if "val" in plan.splits else settings.val_fraction,
        "seed": settings.seed,
        "metric": plan.metric,
        "shots": list(settings.shot_counts),
        "shot_repeats": settings.shot_repeats if settings.shot_counts else None,
        "knn": list(settings.neighbour_counts),
        "grid": regularisation_grid(),
        "tolerance": TOLERANCE,
        "promised_decrease": PROMISED_DECREASE,
        "keys": settings.keys,
        "columns": dataclasses.asdict(plan.splits["train"].dataset.columns),
    }


def _write(
    plan: ProbePlan,
    model: EvaluatedModel,
    features: dict[str, Features],
    seconds: dict[str, float],
    output: Output[LinearSidecar],
) -> LinearResult:
    """Fit the probe on the features of all splits, measure it, and write its files."""
    for split, own in features.items():
        warn_of_skips(plan.splits[split].name, own.skips)
    images = {split: own.to(model.context.device) for split, own in features.items()}
    test = images["test"]
    with timed(seconds, "sweep"):
        fits = ProbeFits(images, plan)
        points, best = fits.sweep()
    with timed(seconds, "refit"):
        solution = fits.refit(best)
        measured = fits.measure(solution.classifier, test)
    if "acc5" in measured and len(plan.classes) < ACCURACY_TOP_K:
        reporting.note(f"lp_acc5 is null because there are only {len(plan.classes)} classes.")
    with timed(seconds, "shots"):
        shots = fits.few_shots(test)
    with timed(seconds, "neighbors"):
        neighbours = fits.measure_neighbours(test)
    probe = {f"lp_{name}": value for name, value in measured.items()}
    guessed, majority = _guess(test.labels, len(plan.classes))
    output.start()
    written = output.root / plan.path.name
    write_metrics(written, model.make_metrics(plan.dataset, TASK, probe | neighbours))
    outputs = [written]
    skipped = output.work / skipped_path(plan.path).name
    if write_skipped(skipped, [make_table(own.skips.listed) for own in features.values()]):
        outputs.append(skipped)
    counts = {
        "images": len(test),
        "train_images": len(fits.images),
        "validation_images": len(fits.held_out),
        "skipped": {split: own.skips.counts for split, own in features.items()},
    }
    result = {
        "metric": plan.metric,
        "c": best.c,
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
        solution=_describe(solution),
        sweep=[{"c": point.c, "validation_score": point.score, **_describe(point.solution)} for point in points],
    )
    return _make_result(sidecar, plan.path, reused=False)


def _guess(labels: torch.Tensor, num_classes: int) -> tuple[dict[str, float], float | None]:
    """Return what a guess scores on images of such classes, by metric, and the share of the largest class."""
    if labels.ndim == 2:
        return guess_order(labels.cpu().numpy()), None
    return guess_classes(num_classes), largest_class(labels.cpu().numpy())


def _make_result(sidecar: LinearSidecar, path: Path, *, reused: bool) -> LinearResult:
    content = msgspec.structs.asdict(read_metrics(path)) | sidecar.result
    files = {"metrics": str(path)} | ({"skipped": str(skipped_path(path))} if skipped_path(path).is_file() else {})
    content |= {"seconds": sidecar.seconds, "files": files, "reused": reused}
    return msgspec.convert(content, LinearResult)


def _describe(solution: Solution) -> dict[str, Any]:
    """Say how well a fit ended, for the sidecar."""
    return {name: getattr(solution, name) for name in ("objective", "gradient_norm", "iterations", "converged")}
