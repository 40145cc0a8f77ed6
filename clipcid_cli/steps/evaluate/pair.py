"""One model on one data set: encode, measure, write metrics, predictions and sidecar."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import Output, OutputSpec, find_output
from clipcid_cli.formats.results.evaluations import ZeroshotSidecar
from clipcid_cli.formats.results.metrics import (
    RETRIEVAL,
    predictions_path,
    read_metrics,
    skipped_path,
    write_metrics,
    write_predictions,
)
from clipcid_cli.formats.skipped import write_listed
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.evaluate.image_groups import describe_groups, find_groups
from clipcid_cli.steps.evaluate.measure import measure
from clipcid_cli.steps.evaluate.model import EvaluatedModel, TaskRows, warn_of_skips
from clipcid_cli.steps.evaluate.predictions import lacks_predictions, wants_predictions
from clipcid_cli.steps.evaluate.result import ZeroshotResult
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

# Settings that change the intervals only.
_DRAWS = ("bootstrap", "seed", "groups")


def evaluate_pair(
    model: EvaluatedModel, task: ZeroshotTask, data: list[FileRecord], path: Path, settings: EvalZeroshotSettings
) -> ZeroshotResult:
    """Measure a model on a data set, unless its metrics file is there; on every process.

    Args:
        data: Fingerprints of the data set.
        path: The metrics file.
    """
    with claim_output(model.context, _identify(model, task, data, path, settings)) as output:

        def find_result() -> ZeroshotResult | None:
            finished = _find_finished(output, path, model, task, settings)
            return None if finished is None else _make_result(finished, task, path, reused=True)

        result = model.context.on_rank0(find_result)
        if result is not None:
            return result
        rows = model.encode(task)
        return model.context.on_rank0(_write, rows, model, output, path, settings)


def is_measured(model: EvaluatedModel, task: ZeroshotTask, path: Path, settings: EvalZeroshotSettings) -> bool:
    """Tell whether a run would find its result there, and say so; on every process, and nothing is written."""
    context = model.context
    spec = _identify(model, task, context.on_rank0(task.fingerprints), path, settings)
    return context.on_rank0(lambda: _find_finished(find_output(spec), path, model, task, settings) is not None)


def _identify(
    model: EvaluatedModel, task: ZeroshotTask, data: list[FileRecord], path: Path, settings: EvalZeroshotSettings
) -> OutputSpec[ZeroshotSidecar]:
    draws = {"bootstrap": settings.bootstrap, "seed": settings.seed} | describe_groups(settings)
    return model.specify(path, ZeroshotSidecar, task.describe() | draws, data, _DRAWS)


def _find_finished(
    output: Output[ZeroshotSidecar],
    path: Path,
    model: EvaluatedModel,
    task: ZeroshotTask,
    settings: EvalZeroshotSettings,
) -> ZeroshotSidecar | None:
    """Return the sidecar of a result that is there with all that is asked for, and say so."""
    if output.finished is None or not path.is_file():
        return None
    what = f"{model.name.spec} on {task.name}"
    measured = read_metrics(path).metrics
    missing = [name for name in task.metric_names if name not in measured]
    if missing:  # of a version that did not know them
        reporting.note(f"{path} has no {', '.join(missing)}; measuring {what} again.")
        return None
    if lacks_predictions(path, what, settings):
        return None
    reporting.note(f"{path} already holds {what}.")
    return output.finished


def _write(
    rows: TaskRows,
    model: EvaluatedModel,
    output: Output[ZeroshotSidecar],
    path: Path,
    settings: EvalZeroshotSettings,
) -> ZeroshotResult:
    """Measure a model by its rows, and write the files of the pair."""
    task = rows.task
    warn_of_skips(task.name, rows.skips)
    if task.kind == RETRIEVAL:
        from clipcid_cli.steps.data_index import note_captions

        note_captions(task.dataset, rows.skips)
    seconds = dict(rows.seconds)
    with timed(seconds, "compare"):
        measured = measure(rows, model.context.device)
        groups = find_groups(rows.keys, task.name, settings)
        draws = dataclasses.replace(measured.draws, groups_N=groups)
        intervals = draws.intervals(settings.bootstrap, settings.seed)
    output.begin_work()
    written = [output.work_top / path.name]
    write_metrics(written[0], model.make_metrics(task.name, task.task, measured.draws.values()))
    if wants_predictions(output, path, settings):
        columns = {"key": rows.keys, **measured.columns()}
        written.append(output.work / predictions_path(path).name)
        write_predictions(written[1], task.kind, model.model.info.slug, task.name, len(task.class_names), columns)
    skipped = skipped_path(path)
    if write_listed(output.work / skipped.name, rows.skips.listed):
        written.append(output.work / skipped.name)
    images = len(rows.encoded.samples)
    sidecar = output.commit(
        counts={"images": images, "texts": measured.texts, "skipped": rows.skips.counts},
        seconds=seconds,
        outputs=[record(file, output.work) for file in written],
        images_per_second=images / seconds["encode"],
        prompts=task.prompt_lines,
        customary=task.customary,
        intervals=intervals,
        groups=None if groups is None else int(groups.max()) + 1,
        chance=measured.chance,
        majority=measured.majority,
        per_class=measured.per_class,
        examples=measured.examples,
    )
    return _make_result(sidecar, task, path, reused=False)


def _make_result(sidecar: ZeroshotSidecar, task: ZeroshotTask, path: Path, *, reused: bool) -> ZeroshotResult:
    files = {"metrics": str(path)}
    if predictions_path(path).is_file():
        files["predictions"] = str(predictions_path(path))
    if skipped_path(path).is_file():
        files["skipped"] = str(skipped_path(path))
    return ZeroshotResult(
        **msgspec.structs.asdict(read_metrics(path)),
        prompts=task.prompt_lines,
        customary=sidecar.customary,
        intervals=sidecar.intervals,
        groups=sidecar.groups,
        chance=sidecar.chance,
        majority=sidecar.majority,
        images=sidecar.counts["images"],
        skipped=sidecar.counts["skipped"],
        images_per_second=round(sidecar.images_per_second, 1),
        seconds=sidecar.seconds,
        files=files,
        reused=reused,
    )
