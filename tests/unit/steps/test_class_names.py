"""Class names and folders of classes: by name, by number, in order."""

from __future__ import annotations

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import match_class_names


@pytest.mark.parametrize(
    ("names", "folders", "labels", "by"),
    [
        (("tabby cat", "Dog"), ("dog", "tabby_cat"), (1, 0), "name"),
        (("cat", "dog", "cow"), ("cow", "dog"), (2, 1), "name"),  # of ten classes some may have no image
        (("2", "0", "1"), ("0", "1", "2"), (1, 2, 0), "name"),  # digits are names where the list holds them
        (("a", "b", "c", "d", "e", "f", "g", "h"), ("0", "5", "7"), (0, 5, 7), "number"),
        (tuple("abcdefghijk"), ("0", "1", "10", "2"), (0, 1, 10, 2), "number"),
        (("crane", "crane", "cat"), ("0", "1", "2"), (0, 1, 2), "number"),
        (("crane", "crane"), ("n1", "n2"), (0, 1), "order"),
        (("crane", "crane"), ("crane", "crane_"), (0, 1), "order"),
        (("x", "y"), ("1", "2"), (0, 1), "order"),  # no line has the number 2
    ],
)
def test_the_name_of_each_folder(
    names: tuple[str, ...], folders: tuple[str, ...], labels: tuple[int, ...], by: str
) -> None:
    found = match_class_names(names, folders)
    assert (found.labels, found.by) == (labels, by)


def test_another_number_of_names_is_refused() -> None:
    with pytest.raises(ClipcidError, match=r"3 class names .* 2 folders"):
        match_class_names(("a", "b", "c"), ("n1", "n2"))
