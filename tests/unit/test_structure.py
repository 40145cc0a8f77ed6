"""Every folder of the package says what it is, and no file is called for nothing."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "clipcid_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


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
