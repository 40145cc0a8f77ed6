"""Classes of two splits matched by name: those of folders, and numbers to which a file of class names gives names."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import (
    CLASS_NAMES,
    find_benchmark_folder,
    plain_name,
    read_class_names,
    read_folder_numbers,
)
from clipcid_cli.formats.data.dataset import Dataset


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a data set as it was given, and opened."""

    name: str  # ``train``, ``test`` or ``val``
    data: str
    dataset: Dataset

    @property
    def spec(self) -> str:
        return self.dataset.spec


def match_classes(train: Split, other: Split, *, several: bool) -> tuple[int, ...] | None:
    """Return the training split's label of each class of another split; None where both number them alike."""
    ours, theirs = train.dataset.classes, other.dataset.classes
    if ours == theirs:
        return None
    if ours is not None and theirs is not None:
        return _match_names(train, ours, other, theirs)
    named, numbered = (train, other) if theirs is None else (other, train)
    if named.dataset.kind == "parquet":  # whose classes are numbered, too
        return None
    if several:
        raise ClipcidError(
            f"{named.spec} has class folders, of one class per image; images of {numbered.spec} may have several.",
            "Give both splits in the same form.",
        )
    folders = named.dataset.classes or ()
    names = _name_numbers(numbered, named, folders)
    if numbered is train:
        return _match_names(train, _unify(train, names), other, _unify(other, folders))
    return _match_names(train, _unify(train, folders), other, _unify(other, names))


def _name_numbers(numbered: Split, named: Split, folders: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a split's numbered classes: the lines of its file, or those of folders called 0, 1, …."""
    path = find_benchmark_folder(os.path.expanduser(numbered.data), numbered.name).class_names
    lines = () if path is None else read_class_names(path)
    # Lines come first: the class names themselves may be digits, in any order.
    if not set(folders) <= set(lines) and read_folder_numbers(folders, len(folders)) is not None:
        return tuple(sorted(folders, key=int))
    if not lines:
        raise ClipcidError(
            f"{named.spec} has class folders, and the classes of {numbered.spec} have no names to match theirs.",
            f"Give class folders in both splits, or tars as a folder with {CLASS_NAMES} in it: one class name per line, in "
            "the order of the numbers from 0.",
        )
    return lines


def _unify(split: Split, names: tuple[str, ...]) -> tuple[str, ...]:
    """Write class names as folders and lists alike may spell them; an error where two become one."""
    unified = tuple(plain_name(name).casefold() for name in names)
    repeated = next((name for name, count in Counter(unified).items() if count > 1), None)
    if repeated is not None:
        raise ClipcidError(
            f"{split.spec}: several classes are called {repeated!r}, so that they cannot be matched by name.",
            "Give each class a name of its own.",
        )
    return unified


def _match_names(train: Split, ours: tuple[str, ...], other: Split, theirs: tuple[str, ...]) -> tuple[int, ...]:
    """Return the place among `ours` of each of `theirs`."""
    label_of = {name: label for label, name in enumerate(ours)}
    unknown = sorted(set(theirs) - set(ours))
    if unknown:
        raise ClipcidError(
            f"{other.spec} has {len(unknown)} {'class' if len(unknown) == 1 else 'classes'} that {train.spec} lacks: "
            f"{', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}.",
            "Add images of what is lacking to the training split, or leave it out of the other; a class must have the same "
            "name in both.",
        )
    return tuple(label_of[name] for name in theirs)
