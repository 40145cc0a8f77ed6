"""What `eval-linear` will do: the model, the splits with their classes, and the metric that chooses the strength."""

from __future__ import annotations

import dataclasses
import glob
import os
from pathlib import Path
from typing import Any

from clipcid_cli.algorithms.metrics.classification import MULTI_LABEL_METRICS, SINGLE_LABEL_METRICS
from clipcid_cli.algorithms.probe import PROMISED_DECREASE, TOLERANCE, regularisation_grid
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.benchmark import (
    BenchmarkFolder,
    customary_metric,
    find_benchmark_folder,
    name_data,
    read_class_names,
)
from clipcid_cli.formats.data.classes import read_vector_length
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.fingerprint import hash_json
from clipcid_cli.formats.results.metrics import CLASSIFICATION, LINEAR_PROBE, MULTI_LABEL, metrics_stem
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps.evaluate.image_groups import describe_groups
from clipcid_cli.steps.evaluate.split_classes import Split, match_classes
from clipcid_cli.steps.evaluate.task_plan import find_copy
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.models import choose_model
from clipcid_cli.steps.open_data import note_left_out, open_named, refuse_empty
from clipcid_cli.steps.settings.eval_linear import METRICS, EvalLinearSettings

# Characters of the training images' data set in the name of a result, which as a file's name may have 255 bytes.
_LONGEST_NAME = 60


@dataclasses.dataclass(frozen=True)
class ProbePlan:
    """A linear probe."""

    name: ModelName
    dataset: str
    classes: tuple[str, ...]  # in the order of the training split's labels
    metric: str  # by which the regularisation strength is chosen
    # ``train`` and ``test``; without ``val`` the strength is chosen on a part of the training split.
    splits: dict[str, ZeroshotTask]
    path: Path  # the metrics file
    settings: EvalLinearSettings

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings by which a finished probe is recognised."""
        settings = self.settings
        reading: dict[str, Any] = {}
        for task in self.splits.values():
            reading |= task.describe_reading()
        numbering = self._numbering()
        if numbering:
            reading["labels"] = numbering
        return {
            "dataset": self.dataset,
            "classes": list(self.classes),
            "val_fraction": None if "val" in self.splits else settings.val_fraction,
            "seed": settings.seed,
            "metric": self.metric,
            "shots": list(settings.shot_counts),
            "shot_repeats": settings.shot_repeats if settings.shot_counts else None,
            "knn": list(settings.neighbour_counts),
            "bootstrap": settings.bootstrap,
            **describe_groups(settings),
            "grid": regularisation_grid(),
            "tolerance": TOLERANCE,
            "promised_decrease": PROMISED_DECREASE,
            **reading,
        }

    def _numbering(self) -> dict[str, list[int]]:
        """Return the labels of splits that a file of class names may give other ones; those of folders follow from data."""
        has_folders = self.splits["train"].dataset.classes is not None
        return {
            split: list(task.label_of)
            for split, task in self.splits.items()
            if task.label_of is not None and has_folders != (task.dataset.classes is not None)
        }


def make_plan(settings: EvalLinearSettings) -> ProbePlan:
    """Find the model, open all splits and match their classes: by name, where both are numbered by number."""
    before_data = settings.data is not None
    model = choose_model(settings.model, settings.work, positional_of="eval-linear", is_before_data=before_data)
    if settings.data is not None:
        refuse_empty(settings.data)
    known = find_copy(settings.data, settings.data_root) if settings.data is not None else None
    folder = os.path.expanduser(str(settings.data)).rstrip("/") if known is None else str(known[1])
    given = {"train": settings.train or f"{folder}/train", "test": settings.test or f"{folder}/test"}
    for split, data in given.items():
        is_named = getattr(settings, split) is not None or "://" in data or "{" in data
        if not (is_named or os.path.exists(data) or glob.glob(data)):
            raise ClipcidError(
                f"There is no data at {data}.",
                f"Give --{split}, or a DATA folder that holds train/ and test/; the first positional argument is the model.",
            )
    names = {split: name_data(data).partition("/")[0] for split, data in given.items()}
    # Both splits have the name of their data set.
    name = names["test"] if known is None else known[0].name
    if settings.val is not None:
        given["val"] = settings.val
    opened = {split: open_named(settings, data) for split, data in given.items()}
    for dataset in opened.values():
        note_left_out(dataset)
    train = opened["train"]
    described = find_benchmark_folder(os.path.expanduser(given["train"]), "train")
    several = described.dataset_type == MULTI_LABEL
    if not several:
        first = next(sample for shard in train.shards for sample in shard.stream())
        several = first.label is None and (first.labels is not None or first.multi_hot is not None)
    classes = _class_names(described, opened)
    kind = MULTI_LABEL if several else CLASSIFICATION
    splits = {}
    for split, dataset in opened.items():
        other = Split(split, given[split], dataset)
        label_of = match_classes(Split("train", given["train"], train), other, several=several)
        splits[split] = ZeroshotTask(f"{name} {split}", kind, dataset, classes, label_of=label_of)
    metric = choose_metric(settings.metric, name, several=several)
    stem = metrics_stem(name, model.slug, LINEAR_PROBE, *_name_training_data(names))
    path = WorkDirectory(settings.work).eval / f"{stem}.json"
    return ProbePlan(model, name, classes, metric, splits, path, settings)


def _name_training_data(names: dict[str, str]) -> tuple[str, ...]:
    """Return what the result's name ends with where the training images are of another data set: ``train-cars``."""
    if names["train"] == names["test"]:
        return ()
    name = names["train"].replace("_", "-")  # a `_` separates the parts of a result's name
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hash_json(names['train'], 4)}"
    return (f"train-{name}",)


def choose_metric(requested: str, name: str, *, several: bool) -> str:
    """Return the metric by which C is chosen: the requested one, or the customary one of such a data set."""
    possible = MULTI_LABEL_METRICS if several else SINGLE_LABEL_METRICS
    if requested == "auto":
        return customary_metric(name, possible)
    if requested not in possible:
        raise UsageError(
            f"--metric {requested} does not fit {name}, where an image has {'several classes' if several else 'one class'}.",
            f"Choose {' or '.join(metric for metric in possible if metric in METRICS)}.",
        )
    return requested


def _class_names(described: BenchmarkFolder, splits: dict[str, Dataset]) -> tuple[str, ...]:
    """Return the class names: the training split's folders, the lines of a file, or else numbers up to the largest used."""
    train = splits["train"]
    if train.classes is not None:
        return train.classes
    if described.class_names is not None:
        return read_class_names(described.class_names)
    samples = (sample for dataset in splits.values() for shard in dataset.shards for sample in shard.stream())
    count = max(map(_min_classes, samples), default=0)
    if not count:
        raise ClipcidError(
            f"{train.spec}: no sample has a class.",
            "A linear probe needs a .cls next to each image (or a .npy with a 1 for each of its classes), a `label` column "
            "or one folder per class.",
        )
    return tuple(map(str, range(count)))


def _min_classes(sample: Sample) -> int:
    """Return the smallest number of classes that one sample allows."""
    if sample.multi_hot is not None:
        return read_vector_length(sample)
    numbers = (sample.label,) if sample.label is not None else sample.labels or ()
    return max(numbers, default=-1) + 1
