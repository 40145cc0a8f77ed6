"""Classes of `export`: those of the classifier, and those by which zero-shot predictions are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark_folder import CLASS_NAMES, find_benchmark_folder
from clipcid_cli.formats.data.class_files import DEFAULT_TEMPLATES, fill_template, read_class_names, read_templates
from clipcid_cli.formats.data.dataset import Dataset, Sample
from clipcid_cli.steps.class_names import match_class_names, plain_name
from clipcid_cli.steps.settings.export import ExportSettings


@dataclasses.dataclass(frozen=True)
class Classes:
    """Class names in order of their labels, their prompt templates, and the files both were read from."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    files: tuple[Path, ...] = ()

    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """Return the prompts of each class, C × T."""
        return tuple(tuple(fill_template(template, name) for template in self.templates) for name in self.names)


def read_classes(settings: ExportSettings) -> Classes | None:
    """Read the classes of ``--classnames``; None without it."""
    if settings.classnames is None:
        return None
    names, templates = settings.classnames, settings.templates
    if names.is_dir():
        folder = find_benchmark_folder(str(names))
        if folder.class_names is None:
            raise ClipcidError(f"{names} has no {CLASS_NAMES}.", "Give a text file with one class name per line.")
        names, templates = folder.class_names, templates or folder.templates
    return _read(names, templates)


def _read(names: Path, templates: Path | None) -> Classes:
    if templates is None:
        return Classes(read_class_names(names), DEFAULT_TEMPLATES, (names,))
    return Classes(read_class_names(names), read_templates(templates), (names, templates))


def label_samples(
    samples: Sequence[Sample], dataset: Dataset, spec: str | None, classes: Classes | None
) -> tuple[Classes, torch.Tensor] | None:
    """Find the classes of a data set and the label of each sample.

    Args:
        dataset: The data set the samples belong to.
        spec: The data set as named on the command line, where its own text files are looked for.
        classes: Classes of ``--classnames``; None takes the data set's own.

    Returns:
        The classes and int64 [N]; None when the data set has no classes, or no names for them.
    """
    labels = [sample.label for sample in samples]
    if not labels or None in labels:
        return None
    if classes is None and spec is not None:
        folder = find_benchmark_folder(spec)
        classes = _read(folder.class_names, folder.templates) if folder.class_names is not None else None
    if classes is None:
        if dataset.classes is None:
            return None
        classes = Classes(tuple(plain_name(name) for name in dataset.classes), DEFAULT_TEMPLATES)
    numbers = torch.tensor(labels)
    if dataset.classes is not None:
        numbers = torch.tensor(match_class_names(classes.names, dataset.classes).labels)[numbers]
    for sample, number in zip(samples, numbers.tolist(), strict=True):
        if not 0 <= number < len(classes.names):
            raise ClipcidError(
                f"{dataset.spec}: sample {sample.key} has class {number}, and there are {len(classes.names)} class names "
                f"(0 … {len(classes.names) - 1}).",
                "Give the matching list of class names with --classnames, or other data with --data.",
            )
    return classes, numbers
