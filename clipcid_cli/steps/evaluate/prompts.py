"""Class names and templates of a data set: those that flags name, else its own, else the default ones."""

from __future__ import annotations

from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import (
    BUILTIN_CLASS_NAMES,
    BUILTIN_TEMPLATES,
    CLASS_NAMES,
    DEFAULT_TEMPLATES,
    BenchmarkFolder,
    match_class_names,
    plain_name,
    read_class_names,
    read_folder_numbers,
    read_templates,
)
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.steps import reporting


def find_templates(named: str | None, folder: BenchmarkFolder) -> tuple[tuple[str, ...], str]:
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


def find_class_names(
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
            fix = "Give a file with one class name per line: --classnames FILE"
            if Path(folder.data).is_dir():
                fix = (
                    f"Write one class name per line to {CLASS_NAMES} in the folder of the data set, or give a file of them: "
                    "--classnames FILE"
                )
            raise ClipcidError(f"{folder.data} has no class names.", fix)
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
