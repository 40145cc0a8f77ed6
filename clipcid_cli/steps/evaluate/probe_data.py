"""What `eval-linear` reads: splits with the same classes to fit, validate and measure on, and a model's features of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from clipcid_cli.algorithms.metrics.average_precision import MULTI_LABEL_METRICS
from clipcid_cli.algorithms.metrics.classification import SINGLE_LABEL_METRICS
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.benchmark_folder import find_benchmark_folder
from clipcid_cli.formats.data.class_files import read_class_names
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset
from clipcid_cli.formats.data.known_datasets import customary_metric
from clipcid_cli.formats.data.samples import Sample, read_vector_length
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.results.features import Features, features_path, read_features, write_features
from clipcid_cli.steps.evaluate.model import EvaluatedModel
from clipcid_cli.steps.evaluate.tasks import CLASSIFICATION, MULTI_LABEL, ZeroshotTask, find_copy
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_linear import METRICS, EvalLinearSettings

_SPLITS = ("train", "test", "val", "validation")


@dataclasses.dataclass(frozen=True)
class ProbeData:
    """The splits of one data set.

    Attributes:
        name: Name of the data set.
        classes: Names of the classes, in the order of the training split's labels.
        metric: Metric by which the regularisation strength is chosen.
        val: Split on which it is chosen; None takes part of the training split.
    """

    name: str
    classes: tuple[str, ...]
    metric: str
    train: ZeroshotTask
    test: ZeroshotTask
    val: ZeroshotTask | None = None

    @property
    def tasks(self) -> tuple[ZeroshotTask, ...]:
        """All splits: training, test and, where there is one, validation."""
        return (self.train, self.test) if self.val is None else (self.train, self.test, self.val)


def open_probe_data(settings: EvalLinearSettings, reporter: Reporter) -> ProbeData:
    """Open all splits and match their classes: class folders by name, numbered classes by number."""
    name, train_data, test_data = _locate(settings, reporter)
    splits = []
    given = {"--train": train_data, "--test": test_data} | ({"--val": settings.val} if settings.val is not None else {})
    for flag, data in given.items():
        if "://" not in data and "{" not in data and not Path(data).exists():
            raise ClipcidError(
                f"There is no data at {data}.",
                f"Give {flag}, or a DATA folder that holds train/ and test/; the first positional argument is the model.",
            )
        columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
        splits.append(open_dataset(data, keys=settings.keys, columns=columns))
    train = splits[0]
    several = _has_several(train_data, train)
    classes = _class_names(train_data, splits)
    tasks = [
        ZeroshotTask(
            f"{name} {flag.removeprefix('--')}",
            CLASSIFICATION,
            split,
            classes,
            label_of=_labels_of(train, split),
            multi_label=several,
        )
        for flag, split in zip(given, splits, strict=True)
    ]
    return ProbeData(name, classes, choose_metric(settings.metric, name, several=several), *tasks)


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


def _locate(settings: EvalLinearSettings, reporter: Reporter) -> tuple[str, str, str]:
    """Return the name of the data set and where its two splits are."""
    found = find_copy(settings.data, settings.data_root, reporter) if settings.data is not None else None
    name, folder = (found[0].name, str(found[1])) if found is not None else (None, str(settings.data).rstrip("/"))
    train = settings.train if settings.train is not None else f"{folder}/train"
    test = settings.test if settings.test is not None else f"{folder}/test"
    return name if name is not None else _name(test), train, test


def _has_several(data: str, train: Dataset) -> bool:
    """Tell whether an image may have several classes."""
    if find_benchmark_folder(data, "train").dataset_type == MULTI_LABEL:
        return True
    first = next(sample for shard in train.shards for sample in shard.stream())
    return first.label is None and (first.labels is not None or first.multi_hot is not None)


def choose_metric(requested: str, name: str, *, several: bool) -> str:
    """Return the metric by which the regularisation strength is chosen: the one requested, or the data set's customary one.

    Raises:
        UsageError: when images have one class each and the metric needs several, or the reverse.
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


def _class_names(data: str, splits: Sequence[Dataset]) -> tuple[str, ...]:
    train = splits[0]
    if train.classes is not None:
        return train.classes
    path = find_benchmark_folder(data, "train").class_names
    if path is not None:
        return read_class_names(path)
    samples = (sample for dataset in splits for shard in dataset.shards for sample in shard.stream())
    count = max((_min_classes(sample) for sample in samples), default=0)
    if not count:
        raise ClipcidError(
            f"{train.spec}: no sample has a class.",
            "A linear probe needs a .cls next to each image (or a .npy with a 1 for each of its classes), a `label` column "
            "or one folder per class.",
        )
    return tuple(str(number) for number in range(count))


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


def extract_features(
    model: EvaluatedModel, task: ZeroshotTask, fingerprints: list[FileRecord], folder: Path
) -> Features:
    """Return a model's features of one split: those kept from an earlier run, or new ones, which are then kept.

    Args:
        fingerprints: Identity of the split's files and images.
        folder: Where features are kept.
    """
    info, machine = model.model.info, model.machine
    identity = {
        "weights": info.weights_hash,
        "preprocess": info.preprocess_hash,
        "data": [[each.size, each.hash] for each in fingerprints],
        "keys": task.dataset.keys,
        "columns": dataclasses.asdict(task.dataset.columns),
        "labels": task.label_of,
        "classes": len(task.class_names) if task.multi_label else None,
        "precision": model.precision.name,
        "batch_size": model.batch_size,
    }
    path = features_path(folder, info.slug, identity)
    kept = machine.on_main(lambda: read_features(path))
    if kept is not None:
        model.reporter.note(f"{task.name}: features of {len(kept.rows):,} images from {path}.")
        return kept
    rows = model.encode(task)
    assert rows.labels is not None, "a classification has labels"
    features = Features(rows.encoded.rows[Kind.IMAGES].numpy(), rows.labels.numpy(), rows.skips)
    machine.on_main(lambda: write_features(path, features))
    return features
