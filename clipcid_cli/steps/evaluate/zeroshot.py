"""`eval-zeroshot`: every model on every data set: embed, measure, write one metrics file per pair."""

from __future__ import annotations

import dataclasses
from itertools import chain
from pathlib import Path
from typing import Any

from clipcid_cli.algorithms.metrics.calibration import BINS
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.image_fingerprint import fingerprint_images
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.metrics import (
    SIDECARS,
    metrics_stem,
    read_metrics,
    read_metrics_sidecar,
    write_metrics,
)
from clipcid_cli.formats.results.predictions import predictions_path, write_predictions
from clipcid_cli.formats.sidecar import ZeroshotSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.evaluate.calibration import FITTED_SHARE
from clipcid_cli.steps.evaluate.compare import compare_results
from clipcid_cli.steps.evaluate.encode import start_workers
from clipcid_cli.steps.evaluate.measure import measure
from clipcid_cli.steps.evaluate.model import EvaluatedModel
from clipcid_cli.steps.evaluate.report import write_summary
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask, plan_tasks
from clipcid_cli.steps.model_choice import choose_model
from clipcid_cli.steps.preflight import check_samples
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


def run(settings: EvalZeroshotSettings, reporter: Reporter) -> dict[str, Any]:
    """Evaluate models on data sets.

    Returns:
        The JSON object: for one pair CLIP_benchmark's fields and ``prompts, customary, intervals{}, images, skipped{},
        images_per_second, seconds{}, files{}, reused``; for several ``{"results": [one such object for each pair],
        "files"{}}``; for ``--compare`` what `compare_results` returns.
    """
    if settings.compare:
        return compare_results(settings, reporter)
    with open_machine(settings.device) as machine:
        names = machine.on_main(lambda: _choose_models(settings, reporter))
        tasks = machine.on_main(lambda: plan_tasks(settings, reporter, names))
        refuse_clashes(names, tasks)
        if settings.dry_run:
            for task in tasks:
                check_samples(task.dataset, machine, settings.seed, dry_run=True, reporter=reporter)
            results = plan_results(names, tasks, settings, reporter)
            return results[0] if len(results) == 1 else {"results": results}
        results, files = evaluate_models(names, tasks, machine, settings, reporter)
    if len(results) == 1:
        return results[0] | {"files": results[0]["files"] | files}
    return {"results": results, "files": files}


def evaluate_models(
    names: list[ModelName],
    tasks: list[ZeroshotTask],
    machine: Machine,
    settings: EvalZeroshotSettings,
    reporter: Reporter,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure every model on every data set and write the metrics files, the table and the report; on every process.

    `distill` ends with it, too.

    Returns:
        One object for each pair, and the paths of table and report.
    """
    for task in tasks:
        check_samples(task.dataset, machine, settings.seed, dry_run=False, reporter=reporter)
    start_workers(machine, settings.workers)
    data = machine.on_main(lambda: [_fingerprint_data(task) for task in tasks])
    results: list[dict[str, Any]] = []
    for name in names:
        evaluated = EvaluatedModel(name, machine, settings, reporter)
        for task, fingerprints in zip(tasks, data, strict=True):
            results.append(_evaluate_pair(evaluated, task, fingerprints, machine, settings, reporter))
    return results, machine.on_main(lambda: write_summary(WorkDirectory(settings.work), results, reporter))


def refuse_measured(names: list[ModelName], tasks: list[ZeroshotTask], settings: EvalZeroshotSettings) -> None:
    """Refuse, before models are trained, the metrics files of earlier ones in the same folders."""
    for path in [_metrics_path(name, task, settings) for name in names for task in tasks]:
        if not settings.overwrite and read_metrics_sidecar(path, ZeroshotSidecar) is not None:
            raise ClipcidError(
                f"{path} holds metrics of an earlier student, which training would replace in the end.",
                "Add --overwrite to replace them, choose another --name, or omit --eval-data.",
            )


def _choose_models(settings: EvalZeroshotSettings, reporter: Reporter) -> list[ModelName]:
    names = [choose_model(spec, settings.work, reporter) for spec in settings.models]
    if settings.model is None and names:
        return names
    return [choose_model(settings.model, settings.work, reporter, positional_of="eval-zeroshot"), *names]


def _stem(name: ModelName, task: ZeroshotTask) -> str:
    return metrics_stem(task.name, name.slug, task.task)


def _metrics_path(name: ModelName, task: ZeroshotTask, settings: EvalZeroshotSettings) -> Path:
    return WorkDirectory(settings.work).eval / f"{_stem(name, task)}.json"


def refuse_clashes(names: list[ModelName], tasks: list[ZeroshotTask]) -> None:
    """Refuse pairs that would write one metrics file.

    Raises:
        UsageError: naming the file.
    """
    stems = [_stem(name, task) for name in names for task in tasks]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise UsageError(
            f"Two of the pairs would write the same metrics file, {twice}.json.",
            "Name each model and data set once, and evaluate folders of the same name in separate commands with different "
            "--work.",
        )


def plan_results(
    names: list[ModelName], tasks: list[ZeroshotTask], settings: EvalZeroshotSettings, reporter: Reporter
) -> list[dict[str, Any]]:
    """Report what would be measured, and return an object for each pair: ``dataset, model, task, files{metrics}``."""
    results = []
    for name in names:
        for task in tasks:
            path = _metrics_path(name, task, settings)
            reporter.note(f"Would measure {task.task} of {name.spec} on {task.dataset.spec} and write {path}.")
            results.append(
                {"dataset": task.name, "model": name.spec, "task": task.task, "files": {"metrics": str(path)}}
            )
    return results


def _fingerprint_data(task: ZeroshotTask) -> list[FileRecord]:
    return [*task.dataset.fingerprints(), fingerprint_images(task.dataset, chain.from_iterable(task.samples(Skips())))]


def _evaluate_pair(
    evaluated: EvaluatedModel,
    task: ZeroshotTask,
    fingerprints: list[FileRecord],
    machine: Machine,
    settings: EvalZeroshotSettings,
    reporter: Reporter,
) -> dict[str, Any]:
    stem = _stem(evaluated.name, task)
    path = _metrics_path(evaluated.name, task, settings)
    identity = task.describe() | {
        "model": evaluated.name.slug,
        "precision": evaluated.precision.name,
        "batch_size": evaluated.batch_size,
        "bootstrap": settings.bootstrap,
        "calibration": {"bins": BINS, "fitted_share": FITTED_SHARE},
        "seed": settings.seed,
    }
    rows = predictions_path(path)
    with claim_output(
        machine,
        path.parent / SIDECARS,
        stem,
        ZeroshotSidecar,
        top=path.parent,
        settings=identity,
        inputs=evaluated.fingerprints() + fingerprints,
        overwrite=settings.overwrite,
        # They change the intervals and the calibration only.
        may_differ=("bootstrap", "seed", "calibration"),
        resumes=False,
    ) as output:
        has_rows = machine.on_main(rows.is_file)
        if output.finished is not None and machine.on_main(path.is_file):
            if not settings.predictions or has_rows:
                reporter.note(f"{path} already holds {evaluated.name.spec} on {task.name}.")
                return _result(machine.on_main(lambda: read_metrics(path)), task, output.finished, path, reused=True)
            reporter.note(f"{path} has no predictions; measuring {evaluated.name.spec} on {task.name} again.")
        if has_rows and (output.finished or output.earlier) is not None:
            # They belong to the same model and data, and do not depend on the draws: keep them up to date.
            settings = dataclasses.replace(settings, predictions=True)
        measured = measure(evaluated.encoder(), task, settings, with_calibration=True)
        result = measured.result
        metrics = evaluated.make_record(task.name, task.task, result.metrics)

        def write() -> ZeroshotSidecar:
            output.start()
            written = [output.root / path.name]
            write_metrics(written[0], metrics)
            if result.predictions is not None:
                written.append(output.work / rows.name)
                write_predictions(written[1], result.predictions)
            return output.commit(
                counts={"images": measured.images, "texts": result.texts, "skipped": measured.skips.counts},
                seconds=measured.seconds,
                outputs=[record(file, output.work) for file in written],
                images_per_second=measured.images / measured.seconds["encode"],
                prompts=task.prompt_lines,
                customary=task.customary,
                intervals=result.intervals,
                calibration=measured.calibration,
                per_class=result.per_class,
                examples=result.examples,
            )

        return _result(metrics, task, machine.on_main(write), path, reused=False)


def _result(
    metrics: dict[str, Any], task: ZeroshotTask, sidecar: ZeroshotSidecar, path: Path, *, reused: bool
) -> dict[str, Any]:
    files = {"metrics": str(path)}
    rows = predictions_path(path)
    if rows.is_file():
        files["predictions"] = str(rows)
    return {
        **metrics,
        "prompts": task.prompt_lines,
        "customary": sidecar.customary,
        "intervals": {name: list(bounds) for name, bounds in sidecar.intervals.items()},
        "calibration": sidecar.calibration,
        "images": sidecar.counts["images"],
        "skipped": sidecar.counts["skipped"],
        "images_per_second": round(sidecar.images_per_second, 1),
        "seconds": sidecar.seconds,
        "files": files,
        "reused": reused,
    }
