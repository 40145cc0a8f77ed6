"""What `eval-zeroshot` measures on each data set that is named: which task, among which classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from clipcid_cli.algorithms.metrics.classification import MULTI_LABEL_METRICS, SINGLE_LABEL_METRICS
from clipcid_cli.algorithms.metrics.groups import OWN_METRICS
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.benchmark import (
    BUILTIN_CLASS_NAMES,
    BUILTIN_TEMPLATES,
    RECALL,
    BenchmarkFolder,
    KnownDataset,
    customary_metric,
    find_benchmark_folder,
    find_known_dataset,
    hash_lines,
)
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.results.metrics import CLASSIFICATION, MULTI_LABEL, RETRIEVAL, LinesRecord
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.image_groups import refuse_groups_of_several
from clipcid_cli.steps.evaluate.prompts import find_class_names, find_templates
from clipcid_cli.steps.evaluate.tasks import TASKS, ZeroshotTask
from clipcid_cli.steps.open_data import open_named
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

# Samples by which classes and captions are found: at the head of the data, where they cost no more than the first.
_LOOKED_AT = 16
_BUILTIN = (*BUILTIN_CLASS_NAMES, *BUILTIN_TEMPLATES)


def plan_tasks(settings: EvalZeroshotSettings, models: Sequence[ModelName] = ()) -> list[ZeroshotTask]:
    """Open every data set; where none is named, what the training runs of the models held out."""
    if settings.data:
        tasks = list[ZeroshotTask]()
        for data in settings.data:
            known, place = find_copy(data, settings.data_root) or (None, data)
            tasks.append(plan_folder(str(place), settings, known, None if known is None else known.name))
    else:
        from clipcid_cli.steps.evaluate.held_out import plan_held_out

        tasks = [plan_held_out(settings, models)]
    refuse_groups_of_several(settings, [task.name for task in tasks])
    idle = " and ".join(f"--{name}" for name in ("classnames", "templates") if getattr(settings, name) is not None)
    if idle and all(task.kind == RETRIEVAL for task in tasks):
        other = "give data with classes: a .cls beside each image, a `label` column or a folder per class"
        if settings.task == RETRIEVAL:
            other = "--task retrieval"
        raise UsageError(
            f"{idle} would have no effect: all is measured by retrieval ({', '.join(task.name for task in tasks)}).",
            f"Omit {idle}, or {other}.",
        )
    return tasks


def plan_folder(
    data: str, settings: EvalZeroshotSettings, known: KnownDataset | None = None, name: str | None = None
) -> ZeroshotTask:
    """Open a data set, which may be a copy of a known one or have a name of its own, and choose what is measured on it."""
    folder = find_benchmark_folder(data, settings.split)
    if name is not None:
        folder = dataclasses.replace(folder, name=name)
    if len(folder.plain_splits) > 1:
        splits = ", ".join(folder.plain_splits)
        reporting.note(f"{data} has the splits {splits}: {settings.split} is measured. --split chooses another.")
    dataset = open_named(settings, folder.data)
    kind = _choose_task(folder, dataset, settings)
    if kind == RETRIEVAL:
        variant = tuple(f"caption-key-{key}" for key in dataset.caption_keys)
        variant += ("caption-lines",) if dataset.caption_lines else ()
        return ZeroshotTask(folder.name, RETRIEVAL, dataset, customary=RECALL, variant=variant)
    names, prompts = settings.classnames, settings.templates
    if known is not None:
        names = known.class_names if names is None and folder.class_names is None else names
        prompts = known.templates if prompts is None and folder.templates is None else prompts
    class_names, names_from, label_of = find_class_names(names, folder, dataset)
    templates, templates_from = find_templates(prompts, folder)
    lines = {
        "class_names": LinesRecord(names_from, len(class_names), hash_lines(class_names)),
        "templates": LinesRecord(templates_from, len(templates), hash_lines(templates)),
    }
    given = {"class_names": settings.classnames, "templates": settings.templates}
    own = None if known is None or kind != CLASSIFICATION else OWN_METRICS.get(known.name)
    single = SINGLE_LABEL_METRICS if own is None else (*SINGLE_LABEL_METRICS, own.name)
    return ZeroshotTask(
        folder.name,
        kind,
        dataset,
        class_names,
        templates,
        label_of=label_of,
        customary=customary_metric(folder.name, MULTI_LABEL_METRICS if kind == MULTI_LABEL else single),
        own=own,
        prompt_lines=lines,
        variant=tuple(
            f"{kind.replace('_', '')}-{flag if flag in _BUILTIN else lines[kind].hash}"
            for kind, flag in given.items()
            if flag is not None
        ),
    )


def find_copy(name: str, root: Path) -> tuple[KnownDataset, Path] | None:
    """Find the local copy, under `root`, of a known data set, and report it; None when the name is not known."""
    copy = find_known_dataset(name, root)
    if copy is not None:
        known, folder = copy
        reporting.note(f"Data: {known.name} (usually reported: {known.metric}) in {folder}.")
        if Path(name).exists() and not Path(name).samefile(folder):
            reporting.note(f"The path {name} in this directory is not used; to use it, write ./{name}.")
    return copy


def _choose_task(folder: BenchmarkFolder, dataset: Dataset, settings: EvalZeroshotSettings) -> str:
    """Return ``classification``, ``multilabel`` or ``retrieval``."""
    if settings.task != "auto":
        return settings.task
    if folder.dataset_type is not None:
        if folder.dataset_type not in TASKS:
            raise ClipcidError(
                f"{folder.data}: dataset_type.txt says {folder.dataset_type!r}; clipcid evaluates {', '.join(TASKS)}.",
                "Give another data set, or say what to measure with --task.",
            )
        return folder.dataset_type
    looked_at = list(islice((sample for shard in dataset.shards for sample in shard.stream()), _LOOKED_AT))
    first = looked_at[0]
    classes = CLASSIFICATION if first.label is not None else MULTI_LABEL
    if first.label is not None or first.labels is not None:
        if any(sample.captions for sample in looked_at):
            reporting.note(
                f"{folder.name} has classes and captions: its classes are measured. For its captions: eval-zeroshot "
                "--task retrieval"
            )
        return classes
    if first.captions:
        several = any(sample.labels is not None for sample in looked_at)
        if several or any(sample.label is not None for sample in looked_at):
            reporting.note(
                f"{folder.name} has captions, and classes of some images: its captions are measured. For its classes: "
                f"eval-zeroshot --task {MULTI_LABEL if several else CLASSIFICATION}"
            )
        return RETRIEVAL
    raise ClipcidError(
        f"{folder.data}: sample {first.key} has neither a class nor a caption.",
        "Classification needs a .cls with a number next to each image, a `label` column or one folder per class; retrieval "
        "a .txt or a caption column; a .npy of zeros and ones is read with --task multilabel.",
    )
