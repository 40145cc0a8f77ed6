"""What `eval-zeroshot` measures on each data set: classification among which classes, or retrieval of which captions."""

from __future__ import annotations

import dataclasses
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.benchmark_folder import BenchmarkFolder, find_benchmark_folder
from clipcid_cli.formats.class_files import DEFAULT_TEMPLATES, fill_template, read_class_names, read_templates
from clipcid_cli.formats.dataset import Columns, Dataset, Sample, open_dataset, open_described
from clipcid_cli.formats.output import read_sidecar, sidecar_path
from clipcid_cli.formats.work import WorkDirectory
from clipcid_cli.runtime.seeds import key_fraction
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

CLASSIFICATION = "zeroshot_classification"
RETRIEVAL = "zeroshot_retrieval"
_TASKS = {"classification": CLASSIFICATION, "retrieval": RETRIEVAL}


@dataclasses.dataclass(frozen=True)
class ZeroshotTask:
    """One data set and what is measured on it.

    Attributes:
        name: Name of the data set.
        task: ``zeroshot_classification`` or ``zeroshot_retrieval``.
        dataset: The data.
        class_names: Names of the classes, in order of the labels; none for retrieval.
        templates: Prompt templates; none for retrieval.
        held_out: Share of the samples that is used, by hash of the key; None uses all.
        label_of: Label by the data set's own number of the class, where class names and folders are in different orders.
    """

    name: str
    task: str
    dataset: Dataset
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    held_out: float | None = None
    label_of: tuple[int, ...] | None = None

    def prompts(self, class_name: str) -> list[str]:
        """Return the prompts of one class."""
        return [fill_template(template, class_name) for template in self.templates]

    def uses(self, sample: Sample) -> bool:
        """Tell whether a sample belongs to the part that is used."""
        return self.held_out is None or key_fraction(sample.key) < self.held_out

    def label(self, sample: Sample) -> int | None:
        """Return the sample's class, None when it has none.

        Raises:
            ClipcidError: when there is no class of that number.
        """
        if sample.label is None:
            return None
        if not 0 <= sample.label < len(self.class_names):
            raise ClipcidError(
                f"{self.dataset.spec}: sample {sample.key} has class {sample.label}, and there are "
                f"{len(self.class_names)} class names (0 … {len(self.class_names) - 1}).",
                "Give the matching list of class names with --classnames.",
            )
        return self.label_of[sample.label] if self.label_of is not None else sample.label

    def describe(self) -> dict[str, Any]:
        """Return what decides the metrics beside model and data, for the sidecar."""
        return {
            "dataset": self.name,
            "task": self.task,
            "class_names": list(self.class_names),
            "templates": list(self.templates),
            "held_out": self.held_out,
            "keys": self.dataset.keys,
            "columns": dataclasses.asdict(self.dataset.columns),
        }


def plan_tasks(settings: EvalZeroshotSettings, reporter: Reporter) -> list[ZeroshotTask]:
    """Open every data set and decide what to measure on it.

    Raises:
        ClipcidError: for the first data set that cannot be opened or lacks what its task needs.
    """
    if not settings.data:
        return [_plan_held_out(settings, reporter)]
    return [_plan_task(data, settings, reporter) for data in settings.data]


def _plan_held_out(settings: EvalZeroshotSettings, reporter: Reporter) -> ZeroshotTask:
    """Retrieval on what the newest training run held out."""
    run = WorkDirectory(settings.work).find_run()
    sidecar = read_sidecar(sidecar_path(run, "distill"))
    assert sidecar is not None, "a run that was found has its sidecar"
    fraction = float(sidecar["settings"]["val_fraction"])
    if fraction == 0:
        raise ClipcidError(
            f"{run} held nothing out (--val-fraction 0), and no data set was named.",
            "Name one: clipcid eval-zeroshot MODEL DATA",
        )
    dataset = open_described(sidecar["data"])
    reporter.note(f"Data: the {fraction:.2%} of {dataset.spec} that {run} held out.")
    name = f"{find_benchmark_folder(dataset.spec).name}-held-out"
    return ZeroshotTask(name, RETRIEVAL, dataset, held_out=fraction)


def _plan_task(data: str, settings: EvalZeroshotSettings, reporter: Reporter) -> ZeroshotTask:
    folder = find_benchmark_folder(data, settings.split)
    columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
    dataset = open_dataset(folder.data, keys=settings.keys, columns=columns)
    task = _choose_task(folder, dataset, settings)
    if task == RETRIEVAL:
        return ZeroshotTask(folder.name, RETRIEVAL, dataset)
    class_names, label_of = _find_class_names(folder, dataset, settings, reporter)
    path = settings.templates or folder.templates
    if path is None:
        reporter.note(f"{folder.name}: no templates were given; taking {', '.join(DEFAULT_TEMPLATES)!r}.")
    templates = read_templates(path) if path is not None else DEFAULT_TEMPLATES
    return ZeroshotTask(folder.name, CLASSIFICATION, dataset, class_names, templates, label_of=label_of)


def _choose_task(folder: BenchmarkFolder, dataset: Dataset, settings: EvalZeroshotSettings) -> str:
    if settings.task != "auto":
        return _TASKS[settings.task]
    if folder.dataset_type is not None:
        if folder.dataset_type not in _TASKS:
            raise ClipcidError(
                f"{folder.data}: dataset_type.txt says {folder.dataset_type!r}; clipcid evaluates {' and '.join(_TASKS)}.",
                "Give another data set, or say what to measure with --task.",
            )
        return _TASKS[folder.dataset_type]
    first = next(samples[0] for shard in dataset.shards if (samples := shard.samples()))
    if first.label is not None:
        return CLASSIFICATION
    if first.captions:
        return RETRIEVAL
    raise ClipcidError(
        f"{folder.data}: sample {first.key} has neither a class nor a caption.",
        "Classification needs a .cls beside each image, a `label` column or one folder per class; retrieval a .txt or a "
        "caption column.",
    )


def _find_class_names(
    folder: BenchmarkFolder, dataset: Dataset, settings: EvalZeroshotSettings, reporter: Reporter
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the class names and, where folders of classes are in another order, the label of each folder."""
    path = settings.classnames or folder.class_names
    if path is None:
        if dataset.classes is None:
            raise ClipcidError(
                f"{folder.data} does not say what its classes are called.",
                "Give a file with one class name a line: --classnames FILE",
            )
        reporter.note(f"{folder.name}: the {len(dataset.classes)} classes are called as their folders.")
        return tuple(_plain_name(name) for name in dataset.classes), None
    class_names = read_class_names(path)
    if dataset.classes is None:
        return class_names, None
    if len(class_names) != len(dataset.classes):
        raise ClipcidError(
            f"{path} names {len(class_names)} classes; {folder.data} has {len(dataset.classes)} folders of classes.",
            "Write one class name for each folder, in the order of the folders' names.",
        )
    # A file that names the folders themselves is matched by name; any other by the order of the folders' names.
    by_name = {_plain_name(name).casefold(): number for number, name in enumerate(class_names)}
    labels = [by_name.get(_plain_name(name).casefold()) for name in dataset.classes]
    if len(by_name) == len(class_names) and None not in labels:
        return class_names, tuple(label for label in labels if label is not None)
    reporter.note(f"{folder.name}: the lines of {path} stand for the class folders in the order of their names.")
    return class_names, None


def _plain_name(name: str) -> str:
    return name.replace("_", " ").strip()
