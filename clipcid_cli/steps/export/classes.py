"""Texts that `export` matches images with: classes of the classifier; classes or captions that measure its accuracy."""

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

# The share of images that find their own text: among the classes, or among the captions of all images.
ACCURACY, RECALL = "acc1", "text_retrieval_recall@1"


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


@dataclasses.dataclass(frozen=True)
class CandidateTexts:
    """Texts among which each image finds its own: the classes, or the captions of all images.

    Attributes:
        measure: `ACCURACY` or `RECALL`.
        prompts: Texts of each candidate, C × T.
        labels: The right candidate of each image, int64 [N].
    """

    measure: str
    prompts: tuple[tuple[str, ...], ...]
    labels: torch.Tensor


def find_candidates(
    samples: Sequence[Sample], dataset: Dataset, spec: str | None, classes: Classes | None
) -> CandidateTexts | None:
    """Find what images are matched with: their classes, where these have names, else their captions; None without both.

    Args:
        spec: The data set as named on the command line, where its own text files are looked for.
        classes: Classes of ``--classnames``; None takes the data set's own.
    """
    classes = classes or _own_classes(dataset, spec)
    if classes is not None and all(sample.label is not None for sample in samples):
        return CandidateTexts(ACCURACY, classes.prompts(), _match_labels(samples, dataset, classes))
    if not all(sample.captions for sample in samples):
        return None
    captions = [sample.captions[0] for sample in samples]
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([numbers[caption] for caption in captions])
    return CandidateTexts(RECALL, tuple((caption,) for caption in numbers), labels)


def _own_classes(dataset: Dataset, spec: str | None) -> Classes | None:
    folder = find_benchmark_folder(spec) if spec is not None else None
    if folder is not None and folder.class_names is not None:
        return _read(folder.class_names, folder.templates)
    if dataset.classes is None:
        return None
    return Classes(tuple(plain_name(name) for name in dataset.classes), DEFAULT_TEMPLATES)


def _match_labels(samples: Sequence[Sample], dataset: Dataset, classes: Classes) -> torch.Tensor:
    labels = torch.tensor([sample.label for sample in samples])
    if dataset.classes is not None:
        labels = torch.tensor(match_class_names(classes.names, dataset.classes).labels)[labels]
    for sample, label in zip(samples, labels.tolist(), strict=True):
        if not 0 <= label < len(classes.names):
            raise ClipcidError(
                f"{dataset.spec}: sample {sample.key} has class {label}, and there are {len(classes.names)} class names "
                f"(0 … {len(classes.names) - 1}).",
                "Give the matching list of class names with --classnames, or other data with --data.",
            )
    return labels
