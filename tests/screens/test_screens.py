"""Every screen is the one that was looked at, and none of them cuts a name.

After an intended change: ``python tests/screens/make.py``, and look at what it wrote.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest
from make import HERE, WIDTHS, make_screens
from scenes import SCENES

_BAR = re.compile("[━╸╺]+")
_MEASURED = re.compile(r"\b0[0,.:]*")


def read_screens(folder: Path, exact_only: bool = False) -> dict[str, str]:
    """Read the screens of a width: text by subcommand and heading."""
    screens = {}
    for subcommand, all_scenes in SCENES.items():
        scenes = [scene for scene in all_scenes if scene.exact or not exact_only]
        parts = (folder / f"{subcommand}.txt").read_text(encoding="utf-8").split("=== ")[1:]
        assert [part.partition("\n")[0] for part in parts] == [scene.about for scene in scenes]
        for scene, part in zip(scenes, parts, strict=True):
            screens[f"{subcommand}, {scene.about}"] = part.rstrip("\n")
    return screens


def fold(screen: str) -> str:
    """Forget how long a measured number is, and what follows from that: where lines end and columns begin."""
    return " ".join(_MEASURED.sub("0", _BAR.sub("━", screen)).split())


def list_differences(shown: dict[str, str], expected: dict[str, str]) -> list[str]:
    exact = {f"{subcommand}, {scene.about}": scene.exact for subcommand, scenes in SCENES.items() for scene in scenes}
    return [
        "\n".join(difflib.unified_diff(expected[name].splitlines(), text.splitlines(), name, "now", lineterm=""))
        for name, text in shown.items()
        if (text != expected[name] if exact[name] else fold(text) != fold(expected[name]))
    ]


def test_commands_show_what_was_looked_at(tmp_path: Path) -> None:
    """All of them at 80 columns; at 120, those whose screens have no measured value: `test_wide_screens` has the others."""
    narrow, wide = tmp_path / "80", tmp_path / "120"
    make_screens({80: narrow, 120: wide}, exact_only=(120,))
    differences = list_differences(read_screens(narrow), read_screens(HERE / "80"))
    differences += list_differences(read_screens(wide, exact_only=True), read_screens(HERE / "120"))
    assert not differences, "\n\n".join(differences)


@pytest.mark.slow
def test_wide_screens(tmp_path: Path) -> None:
    make_screens({120: tmp_path})
    differences = list_differences(read_screens(tmp_path), read_screens(HERE / "120"))
    assert not differences, "\n\n".join(differences)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for name, screen in read_screens(HERE / str(width)).items():
        heading, typed, *lines = screen.splitlines()
        if " 2> " not in typed:
            assert all(len(line) <= width for line in lines), name
        assert heading


def test_no_name_is_cut() -> None:
    narrow, wide = (read_screens(HERE / str(width)) for width in WIDTHS)
    cut = []
    for name, screen in narrow.items():
        if "JSON" in name:  # one line, whatever the terminal
            continue
        whole = fold(wide[name])
        for word in set(fold(screen).split()) - {"\\", *whole.split()}:
            # Paths may end a line after a slash, and what is a column of a wide table has a colon in a narrow one.
            end = "" if word.endswith("/") else r"(?!\S)"
            if not re.search(
                rf"(?<![^\s/]){re.escape(word)}{end}|(?<!\S){re.escape(word.removesuffix(':'))}(?!\S)", whole
            ):
                cut.append(f"{name}: {word}")
    assert not cut
