"""`eval-linear`: frozen features of both splits → logistic regression, C chosen on held-out images → metrics."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.classification import ACCURACY_TOP_K
from clipcid_cli.algorithms.probe.probe import (
    PROMISED_DECREASE,
    TOLERANCE,
    Solution,
    SweepPoint,
    choose_point,
    regularisation_grid,
)
from clipcid_cli.formats.data.image_fingerprint import fingerprint_images
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.results.features import Features
from clipcid_cli.formats.results.metrics import SIDECARS, metrics_stem, read_metrics, write_metrics
from clipcid_cli.formats.sidecar import LinearSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.evaluate.encode import start_workers, warn_of_skips
from clipcid_cli.steps.evaluate.model import EvaluatedModel
from clipcid_cli.steps.evaluate.probe_data import ProbeData, extract_features, open_probe_data
from clipcid_cli.steps.evaluate.probe_fit import LabelledFeatures, ProbeFits
from clipcid_cli.steps.model_choice import choose_model
from clipcid_cli.steps.preflight import check_samples
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

TASK = "linear_probe"
# The probe itself does not depend on them.
_MAY_DIFFER = frozenset({"shots", "shot_repeats", "knn"})


def run(settings: EvalLinearSettings, reporter: Reporter) -> dict[str, Any]:
    """Fit and measure a linear probe.

    Returns:
        The JSON object: CLIP_benchmark's fields with ``lp_acc1, lp_acc5, lp_mean_per_class_recall`` (where images have
        several classes ``lp_mean_average_precision, lp_mean_average_precision_11_point``; of the nearest neighbours the same
        after ``knn<K>_``), and ``metric`` (by which C was
        chosen), ``c`` (the chosen value), ``validation_score, sweep{c[], score[]}, shots[]`` (as
        `ProbeFits.few_shots` returns them), ``images, train_images`` (all that the final fit uses),
        ``validation_images, classes, skipped{train{}, test{}, val{}}, seconds{encode, sweep, refit, shots,
        neighbors}, files{},
        reused``.
    """
    with open_machine(settings.device) as machine:
        name, data = machine.on_main(
            lambda: (
                choose_model(settings.model, settings.work, reporter, positional_of="eval-linear"),
                open_probe_data(settings, reporter),
            )
        )
        path = WorkDirectory(settings.work).eval / f"{metrics_stem(data.name, name.slug, TASK)}.json"
        for task in data.tasks:
            check_samples(task.dataset, machine, settings.seed, dry_run=settings.dry_run, reporter=reporter)
        if settings.dry_run:
            reporter.note(f"Would fit {name.spec} on {data.train.dataset.spec} and write {path}.")
            return {"dataset": data.name, "model": name.spec, "task": TASK, "files": {"metrics": str(path)}}
        start_workers(machine, settings.workers)
        return _evaluate(EvaluatedModel(name, machine, settings, reporter), data, path, machine, settings, reporter)


def _evaluate(
    evaluated: EvaluatedModel,
    data: ProbeData,
    path: Path,
    machine: Machine,
    settings: EvalLinearSettings,
    reporter: Reporter,
) -> dict[str, Any]:
    fingerprints = machine.on_main(
        lambda: [[*task.dataset.fingerprints(), fingerprint_images(task.dataset)] for task in data.tasks]
    )
    with claim_output(
        machine,
        path.parent / SIDECARS,
        path.stem,
        LinearSidecar,
        top=path.parent,
        settings=_identity(evaluated, data, settings),
        inputs=evaluated.fingerprints() + [entry for split in fingerprints for entry in split],
        overwrite=settings.overwrite,
        may_differ=_MAY_DIFFER,
        resumes=False,
    ) as output:
        # An earlier probe that also has a few-shot curve, or nearest neighbours, answers the question without them.
        more = settings.shot_counts or settings.neighbour_counts
        usable = output.finished if more else output.finished or output.earlier
        if usable is not None and machine.on_main(path.is_file):
            reporter.note(f"{path} already holds {evaluated.name.spec} on {data.name}.")
            found: dict[str, Any] = machine.on_main(lambda: read_metrics(path)) | usable.result
            return found | {"files": {"metrics": str(path)}, "reused": True}
        started = time.perf_counter()
        folder, encoder = WorkDirectory(settings.work).features, evaluated.encoder()
        splits = [
            extract_features(encoder, task, inputs, folder)
            for task, inputs in zip(data.tasks, fingerprints, strict=True)
        ]
        for task, features in zip(data.tasks, splits, strict=True):
            warn_of_skips(task, features.skips, reporter)
        seconds = {"encode": time.perf_counter() - started}

        def fit_and_write() -> dict[str, Any]:
            fitted = _fit(data, splits, machine.device, settings, reporter)
            all_seconds = seconds | fitted.seconds
            metrics = evaluated.make_record(data.name, TASK, fitted.metrics)
            result = fitted.result | {"seconds": {phase: round(value, 3) for phase, value in all_seconds.items()}}
            output.start()
            written = output.root / path.name
            write_metrics(written, metrics)
            output.commit(
                counts={count: result[count] for count in ("images", "train_images", "validation_images", "skipped")},
                seconds=all_seconds,
                outputs=[record(written, output.work)],
                result=result,
                solution=_describe(fitted.solution),
                sweep=[
                    {"c": point.c, "validation_score": point.score, **_describe(point.solution)}
                    for point in fitted.sweep
                ],
            )
            return {**metrics, **result, "files": {"metrics": str(path)}, "reused": False}

        return machine.on_main(fit_and_write)


def _identity(evaluated: EvaluatedModel, data: ProbeData, settings: EvalLinearSettings) -> dict[str, Any]:
    """Return the settings by which a finished probe is recognised."""
    return {
        "dataset": data.name,
        "classes": list(data.classes),
        "model": evaluated.name.slug,
        "val_fraction": settings.val_fraction if data.val is None else None,
        "seed": settings.seed,
        "metric": data.metric,
        "shots": list(settings.shot_counts),
        "shot_repeats": settings.shot_repeats if settings.shot_counts else None,
        "knn": list(settings.neighbour_counts),
        "grid": regularisation_grid(),
        "tolerance": TOLERANCE,
        "promised_decrease": PROMISED_DECREASE,
        "precision": evaluated.precision.name,
        "batch_size": evaluated.batch_size,
        "keys": settings.keys,
        "columns": dataclasses.asdict(data.train.dataset.columns),
    }


@dataclasses.dataclass(frozen=True)
class _FittedProbe:
    """A probe and its measurements.

    Attributes:
        metrics: On the test images, by name.
        result: What the JSON object says of the fit.
        seconds: Time by phase: ``sweep``, ``refit``, ``shots``, ``neighbors``.
    """

    solution: Solution
    sweep: list[SweepPoint]
    metrics: dict[str, float]
    result: dict[str, Any]
    seconds: dict[str, float]


def _fit(
    data: ProbeData, splits: list[Features], device: torch.device, settings: EvalLinearSettings, reporter: Reporter
) -> _FittedProbe:
    train, test, *validation = (
        LabelledFeatures(torch.from_numpy(features.rows).to(device), torch.from_numpy(features.labels).to(device))
        for features in splits
    )
    started = time.perf_counter()
    held_out = validation[0] if validation else None
    fits = ProbeFits(train, held_out, len(data.classes), data.metric, settings, reporter)
    points = fits.sweep()
    best = choose_point(points)
    _warn_of_edge(best, points, reporter)
    swept = time.perf_counter()
    solution = fits.refit(best)
    metrics = fits.measure(solution.classifier, test)
    if "acc5" in metrics and len(data.classes) < ACCURACY_TOP_K:
        reporter.note(f"lp_acc5 is null because there are only {len(data.classes)} classes.")
    refitted = time.perf_counter()
    shots = fits.few_shots(test)
    with_shots = time.perf_counter()
    all_metrics = {f"lp_{metric}": value for metric, value in metrics.items()} | fits.measure_neighbours(test)
    result = {
        "metric": data.metric,
        "c": best.c,
        "validation_score": best.score,
        "sweep": {"c": [point.c for point in points], "score": [point.score for point in points]},
        "shots": shots,
        "images": len(test),
        "train_images": len(fits.images),
        "validation_images": len(fits.held_out),
        "classes": len(data.classes),
        "skipped": {
            split: features.skips.counts for split, features in zip(("train", "test", "val"), splits, strict=False)
        },
    }
    seconds = {
        "sweep": swept - started,
        "refit": refitted - swept,
        "shots": with_shots - refitted,
        "neighbors": time.perf_counter() - with_shots,
    }
    return _FittedProbe(solution, points, all_metrics, result, seconds)


def _warn_of_edge(best: SweepPoint, points: list[SweepPoint], reporter: Reporter) -> None:
    if best.c in (points[0].c, points[-1].c):
        reporter.warn(
            f"The best C is {best.c:.3g}, an end of the range {points[0].c:.3g} … {points[-1].c:.3g} that was tried; a "
            "better one may lie outside."
        )


def _describe(solution: Solution) -> dict[str, Any]:
    return {
        "objective": solution.objective,
        "gradient_norm": solution.gradient_norm,
        "iterations": solution.iterations,
        "converged": solution.converged,
    }
