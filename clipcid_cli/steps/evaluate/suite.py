"""``eval-zeroshot --suite``: all data sets of a suite that a folder holds copies of, and their mean as the suite has it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from clipcid_cli.algorithms.metrics.associations import ASSOCIATION_METRICS
from clipcid_cli.algorithms.metrics.intervals import interval_of_mean
from clipcid_cli.algorithms.metrics.retrieval import retrieval_name
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.arrow_tables import find_tables, open_captioned, open_cued
from clipcid_cli.formats.data.benchmark import KNOWN_DATASETS, RECALL, hash_lines
from clipcid_cli.formats.data.suites import (
    DATACOMP,
    DATACOMP_GROUPS,
    MEAN_RECALL,
    SuiteDataset,
    SuiteFolder,
    find_suite,
)
from clipcid_cli.formats.results.metrics import ASSOCIATION, RETRIEVAL, LinesRecord
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.runtime.models.names import CONFIG_NAME
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.result import Previews, ZeroshotResult
from clipcid_cli.steps.evaluate.suite_result import SuiteResult, SuiteScores
from clipcid_cli.steps.evaluate.task_plan import plan_folder
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.evaluate.zeroshot import ZeroshotPlan, choose_models, evaluate, preview_pairs
from clipcid_cli.steps.models import tell_apart
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

_RECALLS = tuple(retrieval_name(sought, "recall@1") for sought in ("image", "text"))


@dataclasses.dataclass(frozen=True)
class SuitePlan:
    """Which copies of which data sets are measured."""

    root: Path
    folder: SuiteFolder
    pairs: ZeroshotPlan


def run_suite(settings: EvalZeroshotSettings) -> SuiteResult | Previews:
    """Measure every model on every data set of the suite that there is a copy of."""
    with open_dist_context(settings.device) as context:
        plan = context.on_rank0(_plan_suite, settings)
        if settings.dry_run:
            missing = ", ".join(dataset.title for dataset in plan.folder.missing)
            reporting.note(f"Missing: {missing or 'none'}.")
            for task in plan.pairs.tasks:
                validate_samples(task.dataset, context, settings, dry_run=True)
            return Previews(preview_pairs(plan.pairs, context))
        answer = evaluate(plan.pairs, context)
    datasets = [dataset for dataset, _ in plan.folder.copies]
    by_model = [answer.results[at : at + len(datasets)] for at in range(0, len(answer.results), len(datasets))]
    models = [_score(datasets, results) for results in by_model]
    without = [title for title in models[0].scores if any(one.scores[title] is None for one in models)]
    return SuiteResult(
        suite=str(settings.suite),
        root=str(plan.root),
        datasets=len(DATACOMP),
        measured=len(datasets),
        missing=[dataset.title for dataset in plan.folder.missing],
        without_metric=without,
        counted={dataset.title: dataset.metric for dataset in datasets},
        models=models,
        results=answer.results,
        files=answer.files,
    )


def _plan_suite(settings: EvalZeroshotSettings) -> SuitePlan:
    named, root = _split_names(settings)
    folder = find_suite(root)
    if not folder.copies:
        raise ClipcidError(
            f"{root} holds none of the {len(DATACOMP)} data sets of {settings.suite}.",
            f"Name the folder of copies last: clipcid eval-zeroshot MODEL --suite {settings.suite} ROOT; in it are folders "
            f"such as {DATACOMP[0].folder}/.",
        )
    reporting.note(f"Data: {len(folder.copies)} of the {len(DATACOMP)} data sets of {settings.suite}, in {root}.")
    settings = dataclasses.replace(settings, data=(), models=(*named[1:], *settings.models))
    names = choose_models(named[:1], settings)
    tasks = [_plan_dataset(dataset, place, root, settings) for dataset, place in folder.copies]
    return SuitePlan(root, folder, ZeroshotPlan(tell_apart(names), tasks, settings))


def _split_names(settings: EvalZeroshotSettings) -> tuple[list[str], Path]:
    """Return the models among what was named, and the folder of copies: what is named last, unless it is a model."""
    named = [*([] if settings.model is None else [settings.model]), *settings.data]
    if named and os.path.isdir(named[-1]) and not os.path.isfile(os.path.join(named[-1], CONFIG_NAME)):
        return named[:-1], Path(named[-1])
    if len(named) > 1 and not os.path.exists(named[-1]):
        raise ClipcidError(f"There is no folder {named[-1]}.", "Name the folder of copies last.")
    return named, settings.data_root


def _plan_dataset(dataset: SuiteDataset, place: Path, root: Path, settings: EvalZeroshotSettings) -> ZeroshotTask:
    if dataset.cached is not None and find_tables(place):
        return _plan_table(dataset, place, root, settings)
    return plan_folder(str(place), settings, KNOWN_DATASETS.get(dataset.name), dataset.name)


def _plan_table(dataset: SuiteDataset, place: Path, root: Path, settings: EvalZeroshotSettings) -> ZeroshotTask:
    """Open a table of the library `datasets`: images with captions, or of cues."""
    if dataset.metric == MEAN_RECALL:
        table = open_captioned(place, root, settings.max_sample_bytes)
        return ZeroshotTask(dataset.name, RETRIEVAL, table, customary=RECALL)
    table, cues = open_cued(place, root, settings.max_sample_bytes)
    prompts = tuple(_prompt(cue.text) for cue in cues)
    return ZeroshotTask(
        dataset.name,
        ASSOCIATION,
        table,
        class_names=prompts,
        templates=("{c}",),
        candidates=tuple(cue.candidates for cue in cues),
        customary=ASSOCIATION_METRICS[0],
        prompt_lines={"class_names": LinesRecord("cues", len(prompts), hash_lines(prompts))},
    )


def _prompt(cue: str) -> str:
    """Return the text that images are compared with."""
    cue = cue.lower()
    return f"An {cue}" if cue[0] in "aeiou" else f"A {cue}"


def _score(datasets: Sequence[SuiteDataset], results: Sequence[ZeroshotResult]) -> SuiteScores:
    """Return what the suite counts of the results of one model on some of its data sets."""
    scores = {dataset.title: _count(dataset, result) for dataset, result in zip(datasets, results, strict=True)}
    known = {title: score for title, score in scores.items() if score is not None}
    if not known:
        raise ClipcidError(
            f"No data set has the metric that counts: {', '.join(scores)} have too few images or candidates.",
            "Download the data sets again.",
        )
    intervals = {
        dataset.title: _count_interval(dataset, result)
        for dataset, result in zip(datasets, results, strict=True)
        if dataset.title in known and result.intervals
    }
    groups = {
        name: fmean(known[title] for title in titles) if known.keys() >= set(titles) else None
        for name, titles in DATACOMP_GROUPS.items()
    }
    mean = fmean(known.values())
    is_whole = len(known) == len(DATACOMP)

    def interval_of(titles: Sequence[str]) -> tuple[float, float]:
        return interval_of_mean([known[title] for title in titles], [intervals[title] for title in titles])

    return SuiteScores(
        results[0].model,
        results[0].pretrained,
        scores,
        groups,
        average=mean if is_whole else None,
        mean_of_measured=mean,
        intervals=intervals,
        group_intervals={
            name: interval_of(titles) for name, titles in DATACOMP_GROUPS.items() if intervals.keys() >= set(titles)
        },
        mean_interval=interval_of(list(known)) if intervals else None,
    )


def _count(dataset: SuiteDataset, result: ZeroshotResult) -> float | None:
    """Return what the suite counts of a result; None where the copy has too few images or candidates for it."""
    metrics: dict[str, float | None] = result.metrics
    if dataset.metric != MEAN_RECALL:
        return metrics.get(dataset.metric)
    recalls = [metrics.get(name) for name in _RECALLS]
    known = [recall for recall in recalls if recall is not None]
    return fmean(known) if len(known) == len(recalls) else None


def _count_interval(dataset: SuiteDataset, result: ZeroshotResult) -> tuple[float, float]:
    """Return the interval of what `_count` does; of two recalls of the same images one that is at least as wide."""
    if dataset.metric != MEAN_RECALL:
        return result.intervals[dataset.metric]
    lows, highs = zip(*(result.intervals[name] for name in _RECALLS), strict=True)
    return fmean(lows), fmean(highs)
