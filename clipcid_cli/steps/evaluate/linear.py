"""`eval-linear`: frozen features of both splits → logistic regression, C chosen on held-out images → metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K
from clipcid_cli.algorithms.probe.probe import PROMISED_DECREASE, TOLERANCE, Solution, regularisation_grid
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.features import Features, features_path, read_features, write_features
from clipcid_cli.formats.results.metrics import read_metrics, write_metrics
from clipcid_cli.formats.sidecar import LinearSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps.evaluate.model import EvaluatedModel, warn_of_skips
from clipcid_cli.steps.evaluate.probe_fit import ProbeFits
from clipcid_cli.steps.evaluate.probe_plan import TASK, ProbePlan, make_plan
from clipcid_cli.steps.evaluate.result import LinearResult, Preview, Sweep
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.preflight import check_samples
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

# The probe itself does not depend on them.
_MAY_DIFFER = frozenset({"shots", "shot_repeats", "knn"})


def run(settings: EvalLinearSettings, reporter: Reporter) -> LinearResult | Preview:
    """Fit and measure a linear probe."""
    with open_machine(settings.device) as machine:
        plan = machine.on_main(lambda: make_plan(settings, reporter))
        for task in plan.splits.values():
            check_samples(task.dataset, machine, settings.seed, dry_run=settings.dry_run, reporter=reporter)
        if settings.dry_run:
            reporter.note(f"Would fit {plan.name.spec} on {plan.splits['train'].dataset.spec} and write {plan.path}.")
            return Preview(plan.dataset, plan.name.spec, TASK, {"metrics": str(plan.path)})
        return _evaluate(plan, EvaluatedModel(plan.name, machine, settings, reporter))


def _evaluate(plan: ProbePlan, model: EvaluatedModel) -> LinearResult:
    path, machine = plan.path, model.machine
    data = machine.on_main(lambda: {split: task.fingerprints() for split, task in plan.splits.items()})
    inputs = [each for records in data.values() for each in records]
    with model.claim(path, LinearSidecar, _identity(plan), inputs, _MAY_DIFFER) as output:
        # An earlier probe that also has a few-shot curve, or nearest neighbours, answers the question without them.
        more = plan.settings.shot_counts or plan.settings.neighbour_counts
        usable = output.finished if more else output.finished or output.earlier

        def find_result() -> LinearResult | None:
            if usable is None or not path.is_file():
                return None
            model.reporter.note(f"{path} already holds {model.name.spec} on {plan.dataset}.")
            return _make_result(usable, path, reused=True)

        found = machine.on_main(find_result)
        if found is not None:
            return found
        seconds: dict[str, float] = {}
        with timed(seconds, "encode"):
            features = {split: extract_features(model, task, data[split]) for split, task in plan.splits.items()}
        return machine.on_main(lambda: _write(plan, model, features, seconds, output))


def extract_features(model: EvaluatedModel, task: ZeroshotTask, data: list[FileRecord]) -> Features:
    """Return a model's features of one split, whose fingerprints are `data`: those of an earlier run, or new ones, kept."""
    info, machine = model.model.info, model.machine
    identity = {
        "weights": info.weights_hash,
        "preprocess": info.preprocess_hash,
        "data": [[each.size, each.hash] for each in data],
        "keys": task.dataset.keys,
        "columns": dataclasses.asdict(task.dataset.columns),
        "labels": task.label_of,
        "classes": len(task.class_names) if task.multi_label else None,
        "precision": model.precision.name,
        "batch_size": model.batch_size,
    }
    path = features_path(WorkDirectory(model.settings.work).features, info.slug, identity)
    kept = machine.on_main(lambda: read_features(path))
    if kept is not None:
        model.reporter.note(f"{task.name}: features of {len(kept):,} images from {path}.")
        return kept
    rows = model.encode(task)
    features = machine.on_all(lambda: Features(rows.encoded.rows[Kind.IMAGES], rows.labels, rows.skips))
    machine.on_main(lambda: write_features(path, features))
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
    reporter = model.reporter
    for split, found in features.items():
        warn_of_skips(plan.splits[split].name, found.skips, reporter)
    images = {split: found.to(model.machine.device) for split, found in features.items()}
    test = images["test"]
    with timed(seconds, "sweep"):
        fits = ProbeFits(images, plan, reporter)
        points, best = fits.sweep()
    with timed(seconds, "refit"):
        solution = fits.refit(best)
        measured = fits.measure(solution.classifier, test)
    if "acc5" in measured and len(plan.classes) < ACCURACY_TOP_K:
        reporter.note(f"lp_acc5 is null because there are only {len(plan.classes)} classes.")
    with timed(seconds, "shots"):
        shots = fits.few_shots(test)
    with timed(seconds, "neighbors"):
        neighbours = fits.measure_neighbours(test)
    probe = {f"lp_{name}": value for name, value in measured.items()}
    output.start()
    written = output.root / plan.path.name
    write_metrics(written, model.make_metrics(plan.dataset, TASK, probe | neighbours))
    counts = {
        "images": len(test),
        "train_images": len(fits.images),
        "validation_images": len(fits.held_out),
        "skipped": {split: found.skips.counts for split, found in features.items()},
    }
    result = {
        "metric": plan.metric,
        "c": best.c,
        "validation_score": best.score,
        "sweep": Sweep([point.c for point in points], [point.score for point in points]),
        "shots": shots,
        "classes": len(plan.classes),
        **counts,
    }
    sidecar = output.commit(
        counts=counts,
        seconds=seconds,
        outputs=[record(written, output.work)],
        result=result,
        solution=_describe(solution),
        sweep=[{"c": point.c, "validation_score": point.score, **_describe(point.solution)} for point in points],
    )
    return _make_result(sidecar, plan.path, reused=False)


def _make_result(sidecar: LinearSidecar, path: Path, *, reused: bool) -> LinearResult:
    content = msgspec.structs.asdict(read_metrics(path)) | sidecar.result
    content |= {"seconds": sidecar.seconds, "files": {"metrics": str(path)}, "reused": reused}
    return msgspec.convert(content, LinearResult)


def _describe(solution: Solution) -> dict[str, Any]:
    """Say how well a fit ended, for the sidecar."""
    return {name: getattr(solution, name) for name in ("objective", "gradient_norm", "iterations", "converged")}
