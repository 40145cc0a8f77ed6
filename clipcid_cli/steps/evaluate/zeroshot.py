"""`eval-zeroshot`: every model on every data set: embed, measure, write metrics for each pair, a table and a report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import ByteRange, match_pattern
from clipcid_cli.formats.files import write_text
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.report import render_report, thumbnail
from clipcid_cli.formats.results.evaluations import Example, ZeroshotSidecar
from clipcid_cli.formats.results.metrics import (
    RETRIEVAL,
    SUMMARY_REPORT,
    SUMMARY_TABLE,
    metrics_stem,
    predictions_path,
    read_metrics,
    read_metrics_sidecar,
    skipped_path,
    write_metrics,
    write_predictions,
    write_results,
)
from clipcid_cli.formats.skipped import make_table, write_skipped
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.runtime.models.names import CONFIG_NAME, ModelName
from clipcid_cli.runtime.timing import timed
from clipcid_cli.shown import is_redacted
from clipcid_cli.steps import reporting
from clipcid_cli.steps.data_index import note_captions
from clipcid_cli.steps.evaluate.compare import compare_results
from clipcid_cli.steps.evaluate.measure import measure
from clipcid_cli.steps.evaluate.model import EvaluatedModel, TaskRows, warn_of_skips
from clipcid_cli.steps.evaluate.result import ComparisonResult, Preview, Previews, ZeroshotResult, ZeroshotResults
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask, plan_tasks
from clipcid_cli.steps.models import choose_model
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

Answer = ZeroshotResult | ZeroshotResults | Preview | Previews | ComparisonResult

_WORST_SHOWN = 8


def run(settings: EvalZeroshotSettings) -> Answer:
    """Evaluate models on data sets; one pair is returned by itself. ``--compare`` compares two earlier results."""
    if settings.compare:
        return compare_results(settings)
    with open_dist_context(settings.device) as context:
        plan = context.on_rank0(lambda: make_plan(settings))
        if settings.dry_run:
            for task in plan.tasks:
                validate_samples(task.dataset, context, settings, dry_run=True)
            previews = plan.preview()
            return previews[0] if len(previews) == 1 else Previews(previews)
        answer = evaluate(plan, context)
    if len(answer.results) > 1:
        return answer
    (only,) = answer.results
    return msgspec.structs.replace(only, files=only.files | answer.files)


@dataclasses.dataclass(frozen=True)
class ZeroshotPlan:
    """Which models are measured on which data sets; each pair has a metrics file of its own."""

    names: list[ModelName]
    tasks: list[ZeroshotTask]
    settings: EvalZeroshotSettings

    def __post_init__(self) -> None:
        """Refuse pairs that would write one metrics file."""
        paths = [self.metrics_path(*pair) for pair in self.pairs]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise UsageError(
                f"Two of the pairs would write the same metrics file, {twice.name}.",
                "Name each model and data set once, and evaluate folders of the same name in separate commands with "
                "different --work.",
            )

    @property
    def pairs(self) -> list[tuple[ModelName, ZeroshotTask]]:
        """Model after model on every data set."""
        return [(name, task) for name in self.names for task in self.tasks]

    def metrics_path(self, name: ModelName, task: ZeroshotTask) -> Path:
        return (
            WorkDirectory(self.settings.work).eval
            / f"{metrics_stem(task.name, name.slug, task.task, *task.variant)}.json"
        )

    def validate_unmeasured(self) -> None:
        """Refuse, before models are trained, the metrics files of earlier ones in the same folders."""
        for path in [self.metrics_path(*pair) for pair in self.pairs]:
            if not self.settings.overwrite and read_metrics_sidecar(path, ZeroshotSidecar) is not None:
                raise ClipcidError(
                    f"{path} holds metrics of an earlier student, which training would replace in the end.",
                    "Add --overwrite to replace them, choose another --name, or omit --eval-data.",
                )

    def preview(self) -> list[Preview]:
        previews = []
        for name, task in self.pairs:
            path = self.metrics_path(name, task)
            reporting.note(f"Would measure {task.task} of {name.spec} on {task.dataset.spec} and write {path}.")
            previews.append(Preview(task.name, name.spec, task.task, {"metrics": str(path)}))
        return previews


def make_plan(settings: EvalZeroshotSettings) -> ZeroshotPlan:
    """Find the models, and open the data sets; a model among these, as of ``runs/*/student DATA``, is one more model.

    A quoted pattern of model folders stands for all of them.
    """
    named = [] if settings.model is None else _match_models(settings.model) or [settings.model]
    models, data = list[str](), list[str]()
    for spec in settings.data:
        folders = _match_models(spec)
        models += folders
        data += [] if folders else [spec]
    for spec in settings.models:
        models += _match_models(spec) or [spec]
    settings = dataclasses.replace(settings, data=tuple(data), models=(*named[1:], *models))
    names = [choose_model(spec, settings.work) for spec in settings.models]
    if named or not names:
        first = named[0] if named else None
        names = [choose_model(first, settings.work, positional_of="eval-zeroshot"), *names]
    return ZeroshotPlan(names, plan_tasks(settings, names), settings)


def _match_models(name: str) -> list[str]:
    """Return the model folders that a path or a pattern names."""
    # pathlib raises where a name is too long, as of a command.
    return [path for path in match_pattern(name) if os.path.isfile(os.path.join(os.path.expanduser(path), CONFIG_NAME))]


def evaluate(plan: ZeroshotPlan, context: DistContext) -> ZeroshotResults:
    """Measure every model on every data set, and write all files; on every process. `distill` ends with it, too."""
    settings = plan.settings
    for task in plan.tasks:
        validate_samples(task.dataset, context, settings, dry_run=False)
    data = context.on_rank0(lambda: [task.fingerprints() for task in plan.tasks])
    results = list[ZeroshotResult]()
    for name in plan.names:
        model = EvaluatedModel(name, context, settings)
        for task, inputs in zip(plan.tasks, data, strict=True):
            results.append(_evaluate_pair(plan, model, task, inputs))
    datasets = [task.dataset for task in plan.tasks] * len(plan.names)
    files = context.on_rank0(lambda: _write_summary(WorkDirectory(settings.work), results, datasets))
    return ZeroshotResults(results, files)


def _evaluate_pair(
    plan: ZeroshotPlan, model: EvaluatedModel, task: ZeroshotTask, data: list[FileRecord]
) -> ZeroshotResult:
    settings = plan.settings
    path = plan.metrics_path(model.name, task)
    # They change the intervals only.
    draws = {"bootstrap": settings.bootstrap, "seed": settings.seed}
    with model.claim(path, ZeroshotSidecar, task.describe() | draws, data, draws) as output:

        def find_result() -> ZeroshotResult | None:
            if output.finished is None or not path.is_file():
                return None
            if settings.predictions and not predictions_path(path).is_file():
                reporting.note(f"{path} has no predictions; measuring {model.name.spec} on {task.name} again.")
                return None
            reporting.note(f"{path} already holds {model.name.spec} on {task.name}.")
            return _make_result(output.finished, task, path, reused=True)

        result = model.context.on_rank0(find_result)
        if result is not None:
            return result
        rows = model.encode(task)
        return model.context.on_rank0(lambda: _write(plan, model, rows, output))


def _write(
    plan: ZeroshotPlan, model: EvaluatedModel, rows: TaskRows, output: Output[ZeroshotSidecar]
) -> ZeroshotResult:
    """Measure a model by its rows, and write the files of the pair."""
    settings = plan.settings
    task = rows.task
    path = plan.metrics_path(model.name, task)
    warn_of_skips(task.name, rows.skips)
    if task.kind == RETRIEVAL:
        note_captions(task.dataset, rows.skips)
    seconds = dict(rows.seconds)
    with timed(seconds, "compare"):
        measured = measure(rows, model.context.device)
        intervals = measured.draws.intervals(settings.bootstrap, settings.seed)
    output.start()
    written = [output.root / path.name]
    write_metrics(written[0], model.make_metrics(task.name, task.task, measured.draws.values()))
    # Predictions of the same model and data do not depend on the draws: those that are there are kept up to date.
    earlier = predictions_path(path)
    if settings.predictions or (earlier.is_file() and (output.finished or output.earlier) is not None):
        columns = {"key": rows.keys, **measured.columns()}
        written.append(output.work / earlier.name)
        write_predictions(written[1], task.kind, model.model.info.slug, task.name, len(task.class_names), columns)
    skipped = skipped_path(path)
    if write_skipped(output.work / skipped.name, [make_table(rows.skips.listed)]):
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
        chance=sidecar.chance,
        majority=sidecar.majority,
        images=sidecar.counts["images"],
        skipped=sidecar.counts["skipped"],
        images_per_second=round(sidecar.images_per_second, 1),
        seconds=sidecar.seconds,
        files=files,
        reused=reused,
    )


def _write_summary(
    work: WorkDirectory, results: Sequence[ZeroshotResult], datasets: Sequence[Dataset]
) -> dict[str, str]:
    """Write the table (csv) and the report of a call over those of the call before, and return their paths.

    Args:
        datasets: What each result was measured on.
    """
    table, report = (work.eval_summary / name for name in (SUMMARY_TABLE, SUMMARY_REPORT))
    table.parent.mkdir(parents=True, exist_ok=True)
    write_results(table, [_row(result) for result in results])
    details = [_detail(result, dataset) for result, dataset in zip(results, datasets, strict=True)]
    page = render_report("eval_zeroshot.html", tables=_tables(results), details=details)
    missing = sum(detail["missing_examples"] for detail in details)
    if missing:
        reporting.note(f"{report}: {missing} example images are left out, since they can no longer be read.")
    write_text(report, page, shared=True)  # two evaluations may end at once
    return {"table": str(table), "report": str(report)}


def _row(result: ZeroshotResult) -> dict[str, Any]:
    """Return the pair's row of the csv: every metric with the ends of its interval."""
    columns = ("model", "pretrained", "dataset", "task", "images", "images_per_second", "customary")
    row = {name: getattr(result, name) for name in columns}
    row |= {f"{kind}_hash": lines.hash for kind, lines in (result.prompts or {}).items()}
    row["majority"] = result.majority
    for name, value in result.metrics.items():
        low, high = result.intervals.get(name, (None, None))
        row |= {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_chance": result.chance.get(name)}
    return row


def _tables(results: Sequence[ZeroshotResult]) -> list[dict[str, Any]]:
    """Return a table for each set of metrics: data sets and models down, metrics across."""
    groups: dict[tuple[str, ...], list[ZeroshotResult]] = {}
    for result in results:
        groups.setdefault(tuple(result.metrics), []).append(result)
    return [
        {"columns": [(name, _title(name)) for name in names], "rows": group, "chance": _describe_chance(group)}
        for names, group in groups.items()
    ]


def _describe_chance(results: list[ZeroshotResult]) -> list[str]:
    """Write what a guess scores on each data set, and what predicting its largest class does."""
    lines = []
    for result in results:
        guessed = ", ".join(f"{_title(name)} {100 * value:.1f}" for name, value in result.chance.items())
        majority = "" if result.majority is None else f"; always the largest class: acc1 {100 * result.majority:.1f}"
        if guessed:
            lines.append(f"Chance on {result.dataset}: {guessed}{majority}.")
    return list(dict.fromkeys(lines))


def _detail(result: ZeroshotResult, dataset: Dataset) -> dict[str, Any]:
    """Return what the report shows of one pair below the table of metrics; images are shown from the data set alone."""
    sidecar = read_metrics_sidecar(Path(result.files["metrics"]), ZeroshotSidecar)
    assert sidecar is not None, "a result has its sidecar"
    settings = sidecar.settings
    own = dataset.choose_own(example.path for example in sidecar.examples)  # the sidecar may be someone else's
    ordered = sorted(
        (score for score in sidecar.per_class if score.images and score.value is not None),
        key=lambda score: score.value or 0.0,
    )
    examples = [
        msgspec.structs.asdict(example) | {"source": source}
        for example in sidecar.examples
        if example.path in own and (source := _thumbnail(example)) is not None
    ]
    wrong: dict[str, list[dict[str, Any]]] = {}
    for example in examples:
        if example["label"] != example["predicted"]:
            wrong.setdefault(example["label"], []).append(example)
    return {
        "model": result.shown_model,
        "dataset": result.dataset,
        "prompts": {kind.replace("_", " "): str(lines) for kind, lines in (result.prompts or {}).items()},
        "measure": "average precision" if settings["multi_label"] else "recall",
        "worst": ordered[:_WORST_SHOWN],
        "classes": sidecar.per_class if len(ordered) > _WORST_SHOWN else [],
        "right": [example for example in examples if example["label"] == example["predicted"]],
        "wrong": wrong,
        "missing_examples": len(sidecar.examples) - len(examples),
        "settings": {
            "templates": ", ".join(settings["templates"][:3]) + (" …" if len(settings["templates"]) > 3 else ""),
            "precision": settings["precision"],
            "batch size": settings["batch_size"],
            "skipped": ", ".join(f"{count} {reason}" for reason, count in result.skipped.items()) or "nothing",
            "metrics file": result.files["metrics"],
        },
    }


def _thumbnail(example: Example) -> str | None:
    """Return an example's image as a small ``data:`` URL; None when it can no longer be read, or its address is secret."""
    if is_redacted(example.path):
        return None
    image = read_image(ByteRange(example.path, example.offset, example.size, column=example.column))
    return None if isinstance(image, SkippedImage) else thumbnail(image)


def _title(name: str) -> str:
    """Write a metric's name as the heading of a column."""
    short = name.replace("mean_per_class_recall", "mean per class").replace("_retrieval_recall@", " R@")
    return short.replace("mean_average_precision", "mAP").replace("_11_point", ", 11 points")
