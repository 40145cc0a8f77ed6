"""What `eval-zeroshot` measures on each data set: classification among which classes, or retrieval of which captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.classification import MULTI_LABEL_METRICS, SINGLE_LABEL_METRICS
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.benchmark import (
    ACCURACY,
    BUILTIN_CLASS_NAMES,
    BUILTIN_TEMPLATES,
    DEFAULT_TEMPLATES,
    RECALL,
    BenchmarkFolder,
    KnownDataset,
    customary_metric,
    fill_template,
    find_benchmark_folder,
    find_known_dataset,
    hash_lines,
    match_class_names,
    plain_name,
    read_class_names,
    read_folder_numbers,
    read_templates,
)
from clipcid_cli.formats.data.dataset import Dataset, open_described
from clipcid_cli.formats.data.image_fingerprint import fingerprint_images
from clipcid_cli.formats.data.samples import Sample, read_classes
from clipcid_cli.formats.fingerprint import FileRecord, hash_json
from clipcid_cli.formats.results.metrics import CLASSIFICATION, MULTI_LABEL, RETRIEVAL, LinesRecord
from clipcid_cli.formats.results.run_folder import DistillSidecar, read_held_out
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps import reporting
from clipcid_cli.steps.data_index import open_named
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

_NAME_ONE = "Name one: clipcid eval-zeroshot MODEL DATA"
_BUILTIN = (*BUILTIN_CLASS_NAMES, *BUILTIN_TEMPLATES)
# As CLIP_benchmark calls them: images with several classes are a classification, too.
_TASKS = {
    CLASSIFICATION: "zeroshot_classification",
    MULTI_LABEL: "zeroshot_classification",
    RETRIEVAL: "zeroshot_retrieval",
}


@dataclasses.dataclass(frozen=True)
class ZeroshotTask:
    """One data set and what is measured on it."""

    name: str
    kind: str  # ``classification``, ``multilabel`` where an image may have any number of classes, or ``retrieval``
    dataset: Dataset
    class_names: tuple[str, ...] = ()  # in order of the labels; none for retrieval, as templates
    templates: tuple[str, ...] = ()
    held_out: frozenset[str] | None = None  # keys of the samples that are used: what training held out; None uses all
    # Of a held-out part: samples of the whole data, to which the limit on unusable ones belongs.
    read: int | None = None
    # Label of each class folder, where folders and class names are in different orders; else None.
    label_of: tuple[int, ...] | None = None
    customary: str = ACCURACY
    # Which ``class_names`` and ``templates`` a score is of; None without prompts.
    prompt_lines: dict[str, LinesRecord] | None = None
    # Ends the names of the files, where flags replace the data set's own prompts, or captions: ``templates-openai``.
    variant: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """CLIP_benchmark's name of the task."""
        return _TASKS[self.kind]

    @property
    def multi_label(self) -> bool:
        return self.kind == MULTI_LABEL

    def prompts(self, class_name: str) -> list[str]:
        return [fill_template(template, class_name) for template in self.templates]

    def stream(self, shard_index: int, skips: Skips) -> Iterator[Sample]:
        """Yield the samples of a shard that are used; where there is an index, no others are read."""
        index, held_out = self.dataset.index, self.held_out
        if held_out is None or index is None:
            for sample in self.dataset.shards[shard_index].stream(skips):
                if held_out is None or sample.key in held_out:
                    yield sample
            return
        skips.merge(index.skips(shard_index))
        part = index.part(shard_index)
        for place, key in enumerate(part.keys.to_pylist()):
            if key in held_out:
                yield part.sample(place)

    def fingerprints(self) -> list[FileRecord]:
        """Describe the files, and the images, classes and captions of the samples that are used."""
        shards = range(len(self.dataset.shards))
        samples = (sample for shard_index in shards for sample in self.stream(shard_index, Skips()))
        return [*self.dataset.fingerprints(), fingerprint_images(self.dataset, samples)]

    def reject(self, sample: Sample) -> str | None:
        """Say why a sample cannot be used: it has no class, or no caption; None where it can."""
        if self.kind == RETRIEVAL:
            return None if sample.captions else "no_caption"
        if self.multi_label:
            listed = sample.multi_hot is not None or sample.labels is not None or sample.label is not None
        else:
            listed = self.label(sample) is not None
        return None if listed else "no_label"

    def label(self, sample: Sample) -> int | None:
        if sample.label is None:
            return None
        if not 0 <= sample.label < len(self.class_names):
            raise ClipcidError(
                f"{self.dataset.spec}: sample {sample.key} has class {sample.label}, and there are "
                f"{len(self.class_names)} class names (0 … {len(self.class_names) - 1}).",
                "Give the matching list of class names with --classnames.",
            )
        return self.label_of[sample.label] if self.label_of is not None else sample.label

    def labels(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return the classes of samples that have one: int64 [B], or bool [B, C] where an image may have several."""
        if not self.multi_label:
            return torch.tensor([self.label(sample) for sample in samples], dtype=torch.int64)
        positive = torch.zeros(len(samples), len(self.class_names), dtype=torch.bool)
        for row, sample in enumerate(samples):
            positive[row, list(read_classes(sample, len(self.class_names)) or ())] = True
        return positive

    def describe(self) -> dict[str, Any]:
        """Return the settings that determine the metrics of a model on the data."""
        described = {
            "dataset": self.name,
            "task": self.task,
            "class_names": list(self.class_names),
            "templates": list(self.templates),
            "multi_label": self.multi_label,
            "held_out": None if self.held_out is None else hash_json(sorted(self.held_out)),
            "keys": self.dataset.keys,
            "columns": dataclasses.asdict(self.dataset.columns),
        }
        if self.kind == RETRIEVAL and self.dataset.caption_lines:
            described["caption_lines"] = True
        if self.kind == RETRIEVAL and self.dataset.caption_keys:
            described["caption_key"] = list(self.dataset.caption_keys)
        return described


def plan_tasks(settings: EvalZeroshotSettings, models: Sequence[ModelName] = ()) -> list[ZeroshotTask]:
    """Open every data set; where none is named, what the training runs of the models held out."""
    tasks = [_plan_task(data, settings) for data in settings.data] or [_plan_held_out(settings, models)]
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


def _plan_held_out(settings: EvalZeroshotSettings, models: Sequence[ModelName]) -> ZeroshotTask:
    """Retrieval on what all the models' training runs held out, else on what the newest one did."""
    folders = [name.path.resolve().parent for name in models if name.path is not None]
    runs = [folder for folder in folders if sidecar_path(folder, "distill").exists()]
    sidecars = {
        run: sidecar
        for run in runs or [WorkDirectory(settings.work).find_student().parent]
        if (sidecar := read_sidecar(sidecar_path(run, "distill"), DistillSidecar)) is not None
    }
    run, trained = next(iter(sidecars.items()))
    if any(other.data != trained.data for other in sidecars.values()):
        raise ClipcidError("The models were trained on different data, and no data set was named.", _NAME_ONE)
    held_out = frozenset.intersection(*map(read_held_out, sidecars))
    named = str(run) if len(sidecars) == 1 else f"all {len(sidecars)} runs"
    if not held_out:
        raise ClipcidError(
            f"There is no sample that {named} held out, and no data set was named.",
            f"{_NAME_ONE}\nOr train with a larger --val-fraction.",
        )
    dataset = open_described(trained.data, WorkDirectory(settings.work).indexes, **settings.trust)
    samples = "sample" if len(held_out) == 1 else "samples"
    reporting.note(f"Data: the {len(held_out):,} {samples} of {dataset.spec} that {named} held out.")
    name = f"{find_benchmark_folder(dataset.spec).name}-held-out"
    return ZeroshotTask(name, RETRIEVAL, dataset, held_out=held_out, read=int(trained.counts["read"]), customary=RECALL)


def _plan_task(data: str, settings: EvalZeroshotSettings) -> ZeroshotTask:
    known, place = find_copy(data, settings.data_root) or (None, data)
    folder = find_benchmark_folder(str(place), settings.split)
    if known is not None:
        folder = dataclasses.replace(folder, name=known.name)
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
    class_names, names_from, label_of = _find_class_names(names, folder, dataset)
    templates, templates_from = _find_templates(prompts, folder)
    lines = {
        "class_names": LinesRecord(names_from, len(class_names), hash_lines(class_names)),
        "templates": LinesRecord(templates_from, len(templates), hash_lines(templates)),
    }
    given = {"class_names": settings.classnames, "templates": settings.templates}
    return ZeroshotTask(
        folder.name,
        kind,
        dataset,
        class_names,
        templates,
        label_of=label_of,
        customary=customary_metric(folder.name, MULTI_LABEL_METRICS if kind == MULTI_LABEL else SINGLE_LABEL_METRICS),
        prompt_lines=lines,
        variant=tuple(
            f"{kind.replace('_', '')}-{flag if flag in _BUILTIN else lines[kind].hash}"
            for kind, flag in given.items()
            if flag is not None
        ),
    )


def _find_templates(named: str | None, folder: BenchmarkFolder) -> tuple[tuple[str, ...], str]:
    """Return the templates, those named, else the data set's own, else the default one, and where they are from."""
    if named in BUILTIN_TEMPLATES:
        from clipcid_cli.runtime.models.prompts import builtin_templates

        templates = builtin_templates(str(named))
        reporting.note(f"{folder.name}: open_clip's {len(templates)} templates named {named}.")
        return templates, str(named)
    path = Path(named).expanduser() if named is not None else folder.templates
    if path is None:
        reporting.note(f"{folder.name}: no templates were given; using {', '.join(DEFAULT_TEMPLATES)!r}.")
        return DEFAULT_TEMPLATES, "default"
    return read_templates(path), str(path)


def _find_class_names(
    named: str | None, folder: BenchmarkFolder, dataset: Dataset
) -> tuple[tuple[str, ...], str, tuple[int, ...] | None]:
    """Return the class names, where they are from and, where folders are in another order, the label of each folder."""
    if named in BUILTIN_CLASS_NAMES:
        from clipcid_cli.runtime.models.prompts import builtin_class_names

        names, labels = _imagenet_names(builtin_class_names(str(named)), folder, dataset)
        return names, str(named), labels
    path = Path(named).expanduser() if named is not None else folder.class_names
    if path is None:
        if dataset.classes is None:
            raise ClipcidError(
                f"{folder.data} has no class names.",
                "Give a file with one class name per line: --classnames FILE",
            )
        source = "parquet metadata" if dataset.kind == "parquet" else "folder names"
        reporting.note(f"{folder.name}: the {len(dataset.classes)} class names are taken from the {source}.")
        return tuple(plain_name(name) for name in dataset.classes), source, None
    class_names = read_class_names(path)
    if dataset.classes is None or dataset.kind == "parquet":  # whose classes are numbered
        return class_names, str(path), None
    try:
        match = match_class_names(class_names, dataset.classes)
    except ClipcidError as error:
        raise ClipcidError(f"{path} does not fit {folder.data}: {error.message}", error.fix) from error
    if match.by == "number":
        reporting.note(f"{folder.name}: the class folders are named by line number in {path}, from 0.")
    elif match.by == "order":
        reporting.note(f"{folder.name}: the lines of {path} name the class folders, sorted by name.")
    return class_names, str(path), match.labels


def _imagenet_names(
    names: dict[str, str], folder: BenchmarkFolder, dataset: Dataset
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return ImageNet's class names; where folders are named by WordNet ID, as in its variants, only those present."""
    if dataset.classes is None or dataset.kind == "parquet":
        return tuple(names.values()), None
    numbers = read_folder_numbers(dataset.classes, len(names))
    if numbers is not None:
        return tuple(names.values()), numbers
    unknown = next((name for name in dataset.classes if name not in names), None)
    if unknown is not None:
        raise ClipcidError(
            f"{folder.data}: the class folder {unknown!r} is not a class of ImageNet (n01440764 … n15075141, or 0 … 999).",
            "Give the class names of this data set with --classnames FILE.",
        )
    if len(dataset.classes) < len(names):
        reporting.note(f"{folder.name}: {len(dataset.classes)} of ImageNet's 1,000 classes; only these are candidates.")
    return tuple(names[name] for name in dataset.classes), None


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
        if folder.dataset_type not in _TASKS:
            raise ClipcidError(
                f"{folder.data}: dataset_type.txt says {folder.dataset_type!r}; clipcid evaluates {', '.join(_TASKS)}.",
                "Give another data set, or say what to measure with --task.",
            )
        return folder.dataset_type
    first = next(sample for shard in dataset.shards for sample in shard.stream())
    if first.label is not None:
        return CLASSIFICATION
    if first.labels is not None:
        return MULTI_LABEL
    if first.captions:
        return RETRIEVAL
    raise ClipcidError(
        f"{folder.data}: sample {first.key} has neither a class nor a caption.",
        "Classification needs a .cls next to each image, a `label` column or one folder per class; retrieval a .txt or a "
        "caption column; a .npy of zeros and ones is read with --task multilabel.",
    )
