"""What `eval-linear` will do: which model is probed, on which splits with the same classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.algorithms.metrics.classification import MULTI_LABEL_METRICS, SINGLE_LABEL_METRICS
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.benchmark_folder import BenchmarkFolder, find_benchmark_folder
from clipcid_cli.formats.data.class_files import read_class_names
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset
from clipcid_cli.formats.data.known_datasets import customary_metric
from clipcid_cli.formats.data.samples import Sample, read_vector_length
from clipcid_cli.formats.results.metrics import metrics_stem
from clipcid_cli.formats.results.predictions import CLASSIFICATION, MULTI_LABEL
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask, find_copy
from clipcid_cli.steps.model_choice import choose_model
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_linear import METRICS, EvalLinearSettings

TASK = "linear_probe"
_SPLITS = ("train", "test", "val", "validation")


@dataclasses.dataclass(frozen=True)
class ProbePlan:
    """A linear probe.

    Attributes:
        dataset: Name of the data set.
        classes: Names of the classes, in the order of the training split's labels.
        metric: Metric by which the regularisation strength is chosen.
        splits: ``train`` and ``test``; without ``val`` the strength is chosen on a part of the training split.
        path: The metrics file.
    """

    name: ModelName
    dataset: str
    classes: tuple[str, ...]
    metric: str
    splits: dict[str, ZeroshotTask]
    path: Path
    settings: EvalLinearSettings


def make_plan(settings: EvalLinearSettings, reporter: Reporter) -> ProbePlan:
    """Find the model, open all splits and match their classes: class folders by name, numbered classes by number."""
    model = choose_model(settings.model, settings.work, reporter, positional_of="eval-linear")
    known = find_copy(settings.data, settings.data_root, reporter) if settings.data is not None else None
    folder = str(settings.data).rstrip("/") if known is None else str(known[1])
    named = {"train": settings.train, "test": settings.test}
    given = {split: f"{folder}/{split}" if data is None else data for split, data in named.items()}
    name = _name(given["test"]) if known is None else known[0].name
    if settings.val is not None:
        given["val"] = settings.val
    columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
    opened = dict[str, Dataset]()
    for split, data in given.items():
        if "://" not in data and "{" not in data and not Path(data).exists():
            raise ClipcidError(
                f"There is no data at {data}.",
                f"Give --{split}, or a DATA folder that holds train/ and test/; the first positional argument is the model.",
            )
        opened[split] = open_dataset(data, keys=settings.keys, columns=columns)
    train, described = opened["train"], find_benchmark_folder(given["train"], "train")
    several = described.dataset_type == MULTI_LABEL
    if not several:
        first = next(sample for shard in train.shards for sample in shard.stream())
        several = first.label is None and (first.labels is not None or first.multi_hot is not None)
    classes = _class_names(described, opened)
    kind = MULTI_LABEL if several else CLASSIFICATION
    splits = {
        split: ZeroshotTask(f"{name} {split}", kind, dataset, classes, label_of=_labels_of(train, dataset))
        for split, dataset in opened.items()
    }
    metric = choose_metric(settings.metric, name, several=several)
    path = WorkDirectory(settings.work).eval / f"{metrics_stem(name, model.slug, TASK)}.json"
    return ProbePlan(model, name, classes, metric, splits, path, settings)


def _labels_of(train: Dataset, other: Dataset) -> tuple[int, ...] | None:
    """Return the training split's label of each class folder of another split; None where classes are numbered."""
    if train is other or other.classes is None or train.classes is None:
        return None
    unknown = sorted(set(other.classes) - set(train.classes))
    if unknown:
        raise ClipcidError(
            f"{other.spec} has {len(unknown)} classes that {train.spec} lacks: {', '.join(unknown[:5])}"
            f"{', …' if len(unknown) > 5 else ''}.",
            "Give the class folders of both splits the same names.",
        )
    return tuple(train.classes.index(name) for name in other.classes)


def choose_metric(requested: str, name: str, *, several: bool) -> str:
    """Return the metric by which the regularisation strength is chosen: the one requested, or the data set's customary one.

    Args:
        several: Whether an image may have several classes.
    """
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
    """Return the names of the training split's folders, those of a file, or else the numbers up to the largest used."""
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
    numbers = sample.labels if sample.labels is not None else (sample.label,) if sample.label is not None else ()
    return max(numbers, default=-1) + 1


def _name(data: str) -> str:
    """Name the data set after the folder that holds its splits."""
    parts = (data if "://" in data else str(Path(data).resolve())).rstrip("/").split("/")
    return parts[-2] if parts[-1] in _SPLITS and len(parts) > 1 else parts[-1]
