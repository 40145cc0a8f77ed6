"""Matching folders of classes to a list of class names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from clipcid_cli.errors import ClipcidError


class ClassMatch(NamedTuple):
    """A class name for each folder of a class."""

    labels: tuple[int, ...]  # for each folder, the number of its class name
    # Whether folders have the names of the classes; their names 0, 1, … are line numbers of the list; or the lines of the
    # list are in the order of the folders' names.
    by: Literal["name", "number", "order"]


def match_class_names(names: Sequence[str], folders: Sequence[str]) -> ClassMatch:
    """Find the class name, of those in order of their labels, of each folder; the folders' names are sorted."""
    # Names come first: the class names themselves may be digits, in any order.
    by_name = {plain_name(name).casefold(): label for label, name in enumerate(names)}
    found = [by_name.get(plain_name(folder).casefold()) for folder in folders]
    named = tuple(label for label in found if label is not None)
    if len(by_name) == len(names) and len(set(named)) == len(folders):
        return ClassMatch(named, "name")
    numbers = read_folder_numbers(folders, len(names))
    if numbers is not None:
        return ClassMatch(numbers, "number")
    if len(names) != len(folders):
        raise ClipcidError(
            f"{len(names)} class names were given; the data has {len(folders)} folders of classes.",
            "Write one class name per folder, in the order of the folders' names.",
        )
    return ClassMatch(tuple(range(len(folders))), "order")


def read_folder_numbers(folders: Sequence[str], num_classes: int) -> tuple[int, ...] | None:
    """Read folder names 0, 1, … as labels (sorted as text, 10 would precede 2); None when they are not such numbers."""
    if not all(re.fullmatch(r"\d+", name) for name in folders):
        return None
    numbers = tuple(int(name) for name in folders)
    return numbers if len(set(numbers)) == len(numbers) and max(numbers) < num_classes else None


def plain_name(name: str) -> str:
    """Return a class's name for prompts: that of its folder, with spaces for underscores."""
    return name.replace("_", " ").strip()
