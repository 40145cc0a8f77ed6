"""`eval-linear`: frozen features of both splits → logistic regression, C chosen on held-out images → metrics."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K
from clipcid_cli.algorithms.probe.probe import (
    PROMISED_DECREASE,
    TOLERANCE,
    Solution,
    choose_point,
    regularisation_grid,
)
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.features import Features
from clipcid_cli.formats.results.metrics import Metrics, metrics_stem, read_metrics, write_metrics
from clipcid_cli.formats.sidecar import LinearSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps.evaluate.model import EvaluatedModel, claim_metrics, start_workers, warn_of_skips
from clipcid_cli.steps.evaluate.probe_data import ProbeData, extract_features, open_probe_data
from clipcid_cli.steps.evaluate.probe_fit import LabelledFeatures, ProbeFits
from clipcid_cli.steps.evaluate.result import LinearResult, Preview, Sweep
from clipcid_cli.steps.model_choice import choose_model
from clipcid_cli.steps.preflight import check_samples
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

TASK = "linear_probe"
# The probe itself does not depend on them.
_MAY_DIFFER = frozenset({"shots", "shot_repeats", "knn"})


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """Which model is probed, on what, and the metrics file."""

    name: ModelName
    data: ProbeData
    path: Path


def run(settings: EvalLinearSettings, reporter: Reporter) -> LinearResult | Preview:
    """Fit and measure a linear probe."""
    with open_machine(settings.device) as machine:
        plan = machine.on_main(lambda: make_plan(settings, reporter))
        for task in plan.data.tasks:
            check_samples(task.dataset, machine, settings.seed, dry_run=settings.dry_run, reporter=reporter)
        if settings.dry_run:
            reporter.note(f"Would fit {plan.name.spec} on {plan.data.train.dataset.spec} and write {plan.path}.")
            return Preview(plan.data.name, plan.name.spec, TASK, {"metrics": str(plan.path)})
        start_workers(machine, settings.workers)
        return _evaluate(plan, EvaluatedModel(plan.name, machine, settings, reporter), settings)


def make_plan(settings: EvalLinearSettings, reporter: Reporter) -> LinearPlan:
    """Find the model, and open the data."""
    name = choose_model(settings.model, settings.work, reporter, positional_of="eval-linear")
    data = open_probe_data(settings, reporter)
    path = WorkDirectory(settings.work).eval / f"{metrics_stem(data.name, name.slug, TASK)}.json"
    return LinearPlan(name, data, path)


def _evaluate(plan: LinearPlan, model: EvaluatedModel, settings: EvalLinearSettings) -> LinearResult:
    data, path, machine = plan.data, plan.path, model.machine
    fingerprints = machine.on_main(lambda: [task.fingerprints() for task in data.tasks])
    all_data = [entry for split in fingerprints for entry in split]
    with claim_metrics(model, path, LinearSidecar, _identity(data, settings), all_data, _MAY_DIFFER) as output:
        # An earlier probe that also has a few-shot curve, or nearest neighbours, answers the question without them.
        more = settings.shot_counts or settings.neighbour_counts
        usable = output.finished if more else output.finished or output.earlier

        def find_result() -> LinearResult | None:
            if usable is None or not path.is_file():
                return None
            model.reporter.note(f"{path} already holds {model.name.spec} on {data.name}.")
            return _make_result(read_metrics(path), usable, path, reused=True)

        found = machine.on_main(find_result)
        if found is not None:
            return found
        started = time.perf_counter()
        folder = WorkDirectory(settings.work).features
        splits = [
            extract_features(model, task, inputs, folder) for task, inputs in zip(data.tasks, fingerprints, strict=True)
        ]
        encoded = time.perf_counter() - started
        return machine.on_main(lambda: _write(plan, model, splits, encoded, settings, output))


def _identity(data: ProbeData, settings: EvalLinearSettings) -> dict[str, Any]:
    """Return the settings by which a finished probe is recognised."""
    return {
        "dataset": data.name,
        "classes": list(data.classes),
        "val_fraction": settings.val_fraction if data.val is None else None,
        "seed": settings.seed,
        "metric": data.metric,
        "shots": list(settings.shot_counts),
        "shot_repeats": settings.shot_repeats if settings.shot_counts else None,
        "knn": list(settings.neighbour_counts),
        "grid": regularisation_grid(),
        "tolerance": TOLERANCE,
        "promised_decrease": PROMISED_DECREASE,
        "keys": settings.keys,
        "columns": dataclasses.asdict(data.train.dataset.columns),
    }


def _write(
    plan: LinearPlan,
    model: EvaluatedModel,
    splits: list[Features],
    encoded: float,
    settings: EvalLinearSettings,
    output: Output[LinearSidecar],
) -> LinearResult:
    """Fit the probe on the features of all splits, measure it, and write its files.

    Args:
        encoded: Seconds that the features took.
    """
    data, reporter, device = plan.data, model.reporter, model.machine.device
    seconds = {"encode": encoded}
    for task, features in zip(data.tasks, splits, strict=True):
        warn_of_skips(task.name, features.skips, reporter)
    train, test, *validation = (
        LabelledFeatures(torch.from_numpy(features.rows).to(device), torch.from_numpy(features.labels).to(device))
        for features in splits
    )
    with timed(seconds, "sweep"):
        fits = ProbeFits(
            train, validation[0] if validation else None, len(data.classes), data.metric, settings, reporter
        )
        points = fits.sweep()
        best = choose_point(points)
    if best.c in (points[0].c, points[-1].c):
        reporter.warn(
            f"The best C is {best.c:.3g}, an end of the range {points[0].c:.3g} … {points[-1].c:.3g} that was tried; a "
            "better one may lie outside."
        )
    with timed(seconds, "refit"):
        solution = fits.refit(best)
        measured = fits.measure(solution.classifier, test)
    if "acc5" in measured and len(data.classes) < ACCURACY_TOP_K:
        reporter.note(f"lp_acc5 is null because there are only {len(data.classes)} classes.")
    with timed(seconds, "shots"):
        shots = fits.few_shots(test)
    with timed(seconds, "neighbors"):
        neighbours = fits.measure_neighbours(test)
    probe = {f"lp_{name}": value for name, value in measured.items()}
    metrics = model.make_metrics(data.name, TASK, probe | neighbours)
    output.start()
    written = output.root / plan.path.name
    write_metrics(written, metrics)
    counts = {
        "images": len(test),
        "train_images": len(fits.images),
        "validation_images": len(fits.held_out),
        "skipped": {
            split: features.skips.counts for split, features in zip(("train", "test", "val"), splits, strict=False)
        },
    }
    result = {
        "metric": data.metric,
        "c": best.c,
        "validation_score": best.score,
        "sweep": Sweep([point.c for point in points], [point.score for point in points]),
        "shots": shots,
        "classes": len(data.classes),
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
    return _make_result(metrics, sidecar, plan.path, reused=False)


def _make_result(metrics: Metrics, sidecar: LinearSidecar, path: Path, *, reused: bool) -> LinearResult:
    content = msgspec.structs.asdict(metrics) | sidecar.result
    content |= {"seconds": sidecar.seconds, "files": {"metrics": str(path)}, "reused": reused}
    return msgspec.convert(content, LinearResult)


def _describe(solution: Solution) -> dict[str, Any]:
    """Say how well a fit ended, for the sidecar."""
    return {name: getattr(solution, name) for name in ("objective", "gradient_norm", "iterations", "converged")}
