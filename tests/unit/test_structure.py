"""The house keeps its measure: rooms of few files, short files, no `utils`."""

from __future__ import annotations

from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "clipcid_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
# Shared by all commands, so not bound to the size of one.
SHARED_BY_COMMANDS = {"console.py", "options.py", "command.py", "config.py"}


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_a_folder_has_at_most_16_files(folder: Path) -> None:
    files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= 16


def test_no_file_is_above_400_lines() -> None:
    assert [relative(path) for path in FILES if length(path) > 400] == []


def test_no_command_is_above_120_lines() -> None:
    commands = [path for path in (PACKAGE / "commands").glob("*.py") if path.name not in SHARED_BY_COMMANDS]
    assert [relative(path) for path in commands if length(path) > 120] == []


def test_nothing_is_called_utils() -> None:
    names = {path.stem for path in FILES} | {folder.name for folder in FOLDERS}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def test_every_folder_says_what_it_is() -> None:
    for folder in FOLDERS:
        assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""'), relative(folder)


def test_no_two_test_files_have_the_same_name() -> None:
    # pytest imports them by name; a run of one folder alone would not notice.
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
