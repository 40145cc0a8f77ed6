"""Classes of `export`: those of the classifier, and those by which zero-shot predictions are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from clipcid_cli.algorithms.metrics.zeroshot import class_weights
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark_folder import CLASS_NAMES, find_benchmark_folder
from clipcid_cli.formats.data.class_files import DEFAULT_TEMPLATES, fill_template, read_class_names, read_templates
from clipcid_cli.formats.data.dataset import Dataset, Sample
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.runtime.models.towers import Encode
from clipcid_cli.steps.class_names import match_class_names, plain_name
from clipcid_cli.steps.settings.export import ExportSettings

_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Classes:
    """Classes and their prompt templates.

    Attributes:
        names: Names in order of the labels.
        files: Files they were read from.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    files: tuple[Path, ...]

    def prompts(self, name: str) -> tuple[str, ...]:
        """Return the prompts of one class."""
        return tuple(fill_template(template, name) for template in self.templates)


def read_classes(settings: ExportSettings) -> Classes | None:
    """Read the classes of ``--classnames``; None without it.

    Raises:
        ClipcidError: when a file is missing or malformed.
    """
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
    read = read_templates(templates) if templates is not None else DEFAULT_TEMPLATES
    return Classes(read_class_names(names), read, (names,) if templates is None else (names, templates))


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

    Raises:
        ClipcidError: when a label has no class, or class folders do not match the names.
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
        classes = Classes(tuple(plain_name(name) for name in dataset.classes), DEFAULT_TEMPLATES, ())
    numbers = torch.tensor(labels)
    if dataset.classes is not None:
        numbers = torch.tensor(match_class_names(classes.names, dataset.classes).labels)[numbers]
    if int(numbers.max()) >= len(classes.names) or int(numbers.min()) < 0:
        wrong = next(index for index, number in enumerate(numbers.tolist()) if not 0 <= number < len(classes.names))
        raise ClipcidError(
            f"{dataset.spec}: sample {samples[wrong].key} has class {int(numbers[wrong])}, and there are "
            f"{len(classes.names)} class names (0 … {len(classes.names) - 1}).",
            "Give the matching list of class names with --classnames, or other data with --data.",
        )
    return classes, numbers


def encode_candidates(prompts: Sequence[Sequence[str]], tokenizer: Tokenizer, encode: Encode) -> torch.Tensor:
    """Embed classes or captions.

    Args:
        prompts: T texts of each of C candidates.
        tokenizer: Texts to int64 [B, L].
        encode: Tokens to unit rows [B, D].

    Returns:
        Their weights, float32 [C, D], unit rows.
    """
    texts = [text for texts in prompts for text in texts]
    rows = [encode(tokenizer(texts[start : start + _BATCH])) for start in range(0, len(texts), _BATCH)]
    return class_weights(torch.cat(rows).float().view(len(prompts), len(prompts[0]), -1))
