"""`eval-zeroshot`: every model on every data set: embed, measure, write metrics for each pair, a table and a report."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.samples import match_pattern
from clipcid_cli.formats.results.evaluations import ZeroshotSidecar
from clipcid_cli.formats.results.metrics import metrics_stem, read_metrics_sidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.models.names import CONFIG_NAME, ModelName
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.means import average_results
from clipcid_cli.steps.evaluate.model import EvaluatedModel
from clipcid_cli.steps.evaluate.pair import evaluate_pair, is_measured
from clipcid_cli.steps.evaluate.report import write_summary
from clipcid_cli.steps.evaluate.result import Preview, Previews, ZeroshotResult, ZeroshotResults
from clipcid_cli.steps.evaluate.task_plan import plan_tasks
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.models import choose_model, tell_apart
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.evaluate.comparison import Comparison
    from clipcid_cli.steps.evaluate.suite_result import SuiteResult

Answer: TypeAlias = "ZeroshotResult | ZeroshotResults | Preview | Previews | Comparison | SuiteResult"


def run(settings: EvalZeroshotSettings) -> Answer:
    """Evaluate models on data sets; one pair is returned by itself. ``--compare`` compares two earlier results."""
    if settings.compare:
        from clipcid_cli.steps.evaluate.compare import compare_results  # it measures nothing

        return compare_results(settings)
    if settings.suite is not None:
        from clipcid_cli.steps.evaluate.suite import run_suite

        return run_suite(settings)
    with open_dist_context(settings.device) as context:
        plan = context.on_rank0(make_plan, settings)
        if settings.dry_run:
            for task in plan.tasks:
                validate_samples(task.dataset, context, settings, dry_run=True)
            previews = preview_pairs(plan, context)
            return previews[0] if len(previews) == 1 else Previews(previews)
        answer = evaluate(plan, context)
    if len(answer.results) > 1:
        return answer
    (only,) = answer.results
    return msgspec.structs.replace(only, files=only.files | answer.files)


def preview_pairs(plan: ZeroshotPlan, context: DistContext) -> list[Preview]:
    """Say of each pair that it is measured already, or would be."""
    previews = list[Preview]()
    for name, task in plan.pairs:
        path = plan.metrics_path(name, task)
        done = context.on_rank0(path.exists)  # else the data need not be hashed
        if done:
            done = is_measured(EvaluatedModel(name, context, plan.settings), task, path, plan.settings)
        previews.append(plan.preview_pair(name, task, is_measured=done))
    return previews


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
                "Name each model and data set once, and evaluate data sets of the same name in separate commands with "
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
        return [self.preview_pair(*pair) for pair in self.pairs]

    def preview_pair(self, name: ModelName, task: ZeroshotTask, *, is_measured: bool = False) -> Preview:
        path = self.metrics_path(name, task)
        if not is_measured:
            reporting.note(f"Would measure {task.task} of {name.spec} on {task.dataset.spec} and write {path}.")
        return Preview(task.name, name.spec, task.task, {"metrics": str(path)}, reused=is_measured)


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
    names = choose_models(named[:1], settings)
    return ZeroshotPlan(tell_apart(names), plan_tasks(settings, names), settings)


def choose_models(first: list[str], settings: EvalZeroshotSettings) -> list[ModelName]:
    """Find the model named first, where there is one, and those of ``--model``; the newest student where none is named."""
    names = [choose_model(spec, settings.work) for spec in settings.models]
    if first or not names:
        names = [choose_model(first[0] if first else None, settings.work, positional_of="eval-zeroshot"), *names]
    return names


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
            path = plan.metrics_path(name, task)
            results.append(evaluate_pair(model, task, inputs, path, settings))
    datasets = [task.dataset for task in plan.tasks] * len(plan.names)
    files = context.on_rank0(lambda: write_summary(WorkDirectory(settings.work), results, datasets))
    return ZeroshotResults(results, files, average_results(results) if len(results) > 1 else [])
