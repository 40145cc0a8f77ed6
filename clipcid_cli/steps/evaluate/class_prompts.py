"""The classes of a data set, and how a text tower is prompted for them."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark_folder import BenchmarkFolder
from clipcid_cli.formats.data.class_files import (
    BUILTIN_CLASS_NAMES,
    BUILTIN_TEMPLATES,
    DEFAULT_TEMPLATES,
    read_class_names,
    read_templates,
)
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.known_datasets import KnownDataset
from clipcid_cli.runtime.models.clip_model import builtin_class_names, builtin_templates
from clipcid_cli.steps.class_names import match_class_names, plain_name, read_folder_numbers
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


def find_templates(
    folder: BenchmarkFolder, settings: EvalZeroshotSettings, known: KnownDataset | None, reporter: Reporter
) -> tuple[tuple[str, ...], str]:
    """Return the templates, those asked for, else the data set's own, else the default one, and where they are from."""
    named = settings.templates
    if named is None and folder.templates is None and known is not None:
        named = known.templates
    if named in BUILTIN_TEMPLATES:
        templates = builtin_templates(str(named))
        reporter.note(f"{folder.name}: open_clip's {len(templates)} templates named {named}.")
        return templates, str(named)
    path = Path(named) if named is not None else folder.templates
    if path is None:
        reporter.note(f"{folder.name}: no templates were given; using {', '.join(DEFAULT_TEMPLATES)!r}.")
        return DEFAULT_TEMPLATES, "default"
    return read_templates(path), str(path)


def find_class_names(
    folder: BenchmarkFolder,
    dataset: Dataset,
    settings: EvalZeroshotSettings,
    known: KnownDataset | None,
    reporter: Reporter,
) -> tuple[tuple[str, ...], str, tuple[int, ...] | None]:
    """Return the class names, where they are from and, where folders are in another order, the label of each folder."""
    named = settings.classnames
    if named is None and folder.class_names is None and known is not None:
        named = known.class_names
    if named in BUILTIN_CLASS_NAMES:
        names, labels = _imagenet_names(builtin_class_names(str(named)), folder, dataset, reporter)
        return names, str(named), labels
    path = Path(named) if named is not None else folder.class_names
    if path is None:
        if dataset.classes is None:
            raise ClipcidError(
                f"{folder.data} has no class names.",
                "Give a file with one class name per line: --classnames FILE",
            )
        reporter.note(f"{folder.name}: the {len(dataset.classes)} class names are taken from the folder names.")
        return tuple(plain_name(name) for name in dataset.classes), "folder names", None
    class_names = read_class_names(path)
    if dataset.classes is None:
        return class_names, str(path), None
    try:
        match = match_class_names(class_names, dataset.classes)
    except ClipcidError as error:
        raise ClipcidError(f"{path} does not fit {folder.data}: {error.message}", error.fix) from error
    if match.by == "number":
        reporter.note(f"{folder.name}: the class folders are named by line number in {path}, from 0.")
    elif match.by == "order":
        reporter.note(f"{folder.name}: the lines of {path} name the class folders, sorted by name.")
    return class_names, str(path), match.labels


def _imagenet_names(
    names: dict[str, str], folder: BenchmarkFolder, dataset: Dataset, reporter: Reporter
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return ImageNet's class names; where folders are named by WordNet ID, as in its variants, only those present."""
    if dataset.classes is None:
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
        reporter.note(f"{folder.name}: {len(dataset.classes)} of ImageNet's 1,000 classes; only these are candidates.")
    return tuple(names[name] for name in dataset.classes), None
