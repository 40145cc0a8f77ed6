"""`eval-linear`: frozen features of both splits → logistic regression, its strength chosen on held-out images → metrics."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.zeroshot import ACCURACY_TOP_K
from clipcid_cli.algorithms.probe.logistic_regression import PROMISED_DECREASE
from clipcid_cli.algorithms.probe.probe import TOLERANCE, Solution, regularisation_grid
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.image_fingerprint import fingerprint_images
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.features import Features
from clipcid_cli.formats.results.metrics import SIDECARS, make_metrics, metrics_stem, read_metrics, write_metrics
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.loading import start_worker_server
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.evaluate.probe_data import ProbeData, extract_features, open_probe_data
from clipcid_cli.steps.evaluate.probe_fit import Images, ProbeFits, SweepPoint, choose_point
from clipcid_cli.steps.evaluate.zeroshot import EvaluatedModel
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

TASK = "linear_probe"
# Few-shot curves come and go beside the same probe.
_REPLACEABLE = frozenset({"shots", "shot_repeats"})
_BATCH = {"cpu": 64, "cuda": 256}


def run(settings: EvalLinearSettings, reporter: Reporter) -> dict[str, Any]:
    """Fit and measure a linear probe.

    Returns:
        The JSON object: CLIP_benchmark's fields with ``lp_acc1, lp_acc5, lp_mean_per_class_recall`` (where images have
        several classes ``lp_mean_average_precision, lp_mean_average_precision_11_point``), and ``metric`` (the one C was
        chosen by), ``c`` (the chosen strength), ``validation_score, sweep{c[], score[]}, shots[]`` (as
        `ProbeFits.few_shots` returns them), ``images, train_images`` (all that the last fit takes),
        ``validation_images, classes, skipped{train{}, test{}, val{}}, seconds{encode, sweep, refit, shots}, files{},
        reused``.

    Raises:
        ClipcidError: when the model or a split cannot be read, or too many samples cannot be used.
    """
    with open_machine(settings.device) as machine:
        name, data = machine.on_main(lambda: (_choose_model(settings, reporter), open_probe_data(settings, reporter)))
        path = WorkDirectory(settings.work).eval / f"{metrics_stem(data.name, name.slug, TASK)}.json"
        if settings.dry_run:
            reporter.note(f"Would fit {name.spec} on {data.train.dataset.spec} and write {path}.")
            return {"dataset": data.name, "model": name.spec, "task": TASK, "files": {"metrics": str(path)}}
        if settings.workers or (settings.workers is None and machine.device.type == "cuda"):
            start_worker_server()
        return _evaluate(EvaluatedModel(name, machine), data, path, machine, settings, reporter)


def _choose_model(settings: EvalLinearSettings, reporter: Reporter) -> ModelName:
    if settings.model is None:
        student = WorkDirectory(settings.work).find_student()
        reporter.note(f"Model: {student}, the newest student of {settings.work}.")
        return parse_model(str(student))
    try:
        name = with_default_tag(parse_model(settings.model))
    except ClipcidError as error:
        if not Path(settings.model).exists():
            raise
        raise ClipcidError(
            f"{error.message}\n{settings.model} was taken for the model, since the first positional is the model.",
            f"Put the model first: clipcid eval-linear MODEL {settings.model}",
        ) from error
    if name.spec != settings.model:
        reporter.note(f"Weights: {name.spec}.")
    return name


def _evaluate(
    evaluated: EvaluatedModel,
    data: ProbeData,
    path: Path,
    machine: Machine,
    settings: EvalLinearSettings,
    reporter: Reporter,
) -> dict[str, Any]:
    precision = choose_precision(settings.precision, machine.device, "evaluate", parameters=0)
    batch_size = settings.batch_size or _BATCH[machine.device.type]
    wanted = {
        "dataset": data.name,
        "classes": list(data.classes),
        "model": evaluated.name.slug,
        "val_fraction": settings.val_fraction if data.val is None else None,
        "seed": settings.seed,
        "metric": data.metric,
        "shots": list(settings.shot_counts),
        "shot_repeats": settings.shot_repeats if settings.shot_counts else None,
        "grid": regularisation_grid(),
        "tolerance": TOLERANCE,
        "promised_decrease": PROMISED_DECREASE,
        "precision": precision.name,
        "batch_size": batch_size,
        "keys": settings.keys,
        "columns": dataclasses.asdict(data.train.dataset.columns),
    }
    files = machine.on_main(
        lambda: [[*task.dataset.fingerprints(), fingerprint_images(task.dataset)] for task in data.tasks]
    )
    inputs = evaluated.fingerprints() + [entry for split in files for entry in split]
    with claim_output(
        machine,
        path.parent / SIDECARS,
        path.stem,
        settings=wanted,
        inputs=inputs,
        overwrite=settings.overwrite,
        replaceable=_REPLACEABLE,
        resumable=False,
    ) as output:
        # A probe that has a few-shot curve beside it is all that is asked for by who asks for no curve.
        there = output.finished if settings.shot_counts else output.finished or output.earlier
        if there is not None and machine.on_main(path.is_file):
            reporter.note(f"{path} holds {evaluated.name.spec} on {data.name} already.")
            record = machine.on_main(lambda: read_metrics(path))
            return {**record, **there["result"], "files": {"metrics": str(path)}, "reused": True}
        started = time.perf_counter()
        folder = WorkDirectory(settings.work).features
        model = evaluated.load()
        extracted = [
            extract_features(model, task, fingerprints, folder, machine, precision, batch_size, settings, reporter)
            for task, fingerprints in zip(data.tasks, files, strict=True)
        ]
        for task, features in zip(data.tasks, extracted, strict=True):
            if features.skips.total:
                reporter.warn(f"{task.name}: {features.skips.total} samples were skipped.\n{features.skips.describe()}")
        seconds = {"encode": time.perf_counter() - started}
        return machine.on_main(
            lambda: _fit_and_write(
                evaluated.name, data, extracted, path, output, seconds, machine.device, settings, reporter
            )
        )


def _fit_and_write(
    name: ModelName,
    data: ProbeData,
    extracted: list[Features],
    path: Path,
    output: Output,
    seconds: dict[str, float],
    device: torch.device,
    settings: EvalLinearSettings,
    reporter: Reporter,
) -> dict[str, Any]:
    images, test_images, *val_images = (
        Images(torch.from_numpy(features.rows).to(device), torch.from_numpy(features.labels).to(device))
        for features in extracted
    )
    started = time.perf_counter()
    held_out = val_images[0] if val_images else None
    fits = ProbeFits(images, held_out, len(data.classes), data.metric, settings, reporter)
    points = fits.sweep()
    best = choose_point(points)
    _warn_of_edge(best, points, reporter)
    swept = time.perf_counter()
    solution = fits.refit(best)
    metrics = fits.measure(solution.classifier, test_images)
    if "acc5" in metrics and len(data.classes) < ACCURACY_TOP_K:
        reporter.note(f"lp_acc5 is null, since there are only {len(data.classes)} classes.")
    refitted = time.perf_counter()
    shots = fits.few_shots(test_images)
    seconds |= {"sweep": swept - started, "refit": refitted - swept, "shots": time.perf_counter() - refitted}
    record = make_metrics(
        dataset=data.name,
        model=name.architecture or name.slug,
        pretrained=name.tag or name.spec,
        task=TASK,
        metrics={f"lp_{metric}": value for metric, value in metrics.items()},
    )
    result = {
        "metric": data.metric,
        "c": best.c,
        "validation_score": best.score,
        "sweep": {"c": [point.c for point in points], "score": [point.score for point in points]},
        "shots": shots,
        "images": len(test_images),
        "train_images": len(fits.images),
        "validation_images": len(fits.held_out),
        "classes": len(data.classes),
        "skipped": {
            split: features.skips.counts for split, features in zip(("train", "test", "val"), extracted, strict=False)
        },
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
    }
    output.drop_earlier(path)
    write_metrics(path, record)
    output.commit(
        counts={name: result[name] for name in ("images", "train_images", "validation_images", "skipped")},
        seconds=seconds,
        result=result,
        solution=_describe(solution),
        sweep=[{"c": point.c, "validation_score": point.score, **_describe(point.solution)} for point in points],
    )
    return {**record, **result, "files": {"metrics": str(path)}, "reused": False}


def _warn_of_edge(best: SweepPoint, points: list[SweepPoint], reporter: Reporter) -> None:
    if best.c in (points[0].c, points[-1].c):
        reporter.warn(
            f"The best C is {best.c:.3g}, an end of the range {points[0].c:.3g} … {points[-1].c:.3g} that was tried: a "
            "better one may lie beyond."
        )


def _describe(solution: Solution) -> dict[str, Any]:
    return {
        "objective": solution.objective,
        "gradient_norm": solution.gradient_norm,
        "iterations": solution.iterations,
        "converged": solution.converged,
    }
