"""Text files to texts: what a line may hold, what is refused, and that texts are read from where they are mapped."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings import text_folder
from clipcid_cli.formats.embeddings.text_folder import LONGEST_LINE, TextLines, copy_texts, open_texts, texts_path


def write(folder: Path, content: bytes) -> Path:
    path = folder / "texts.txt"
    path.write_bytes(content)
    return path


def test_lines_become_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_folder, "TEXTS_A_FILE", 3)
    content = "\ufeffa red dog\r\n\n  ein Löwe \n犬\n   \nlast, 1,000\nthe very " + "x" * 8_180
    counts = copy_texts(write(tmp_path, content.encode()), tmp_path / "out")
    assert (counts.texts, counts.empty) == (5, 2)
    lines = pickle.loads(pickle.dumps(TextLines(str(texts_path(tmp_path / "out")))))
    expected = ["a red dog", "ein Löwe", "犬", "last, 1,000", "the very " + "x" * 8_180]
    assert [lines[row] for row in range(5)] == expected
    assert list(lines) == expected
    assert lines.batch_sizes() == [3, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text: it has 0 lines, all empty"),
        (b"\n \n\n", "holds no text: it has 3 lines, all empty"),
        (b"good\nb\xe4d\n", "line 2, is not UTF-8: byte 2 is 0xe4"),
        (b"good\nba\0d\n", "line 2, holds a NUL character"),
        (b"x" * (LONGEST_LINE + 1), "line 1, is longer than 8,192 characters"),
        ("犬".encode() * 200_000, "line 1, is longer than 8,192 characters"),
        (b"\xff" * 100_000, "line 1, is longer than 8,192 characters"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    source = write(tmp_path, content)
    with pytest.raises(ClipcidError, match=message):
        copy_texts(source, tmp_path / "out")
    assert not texts_path(tmp_path / "out").exists()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match=r"missing\.txt cannot be read: No such file"):
        copy_texts(tmp_path / "missing.txt", tmp_path / "out")
    with pytest.raises(ClipcidError, match="There are none in") as raised:
        open_texts(tmp_path / "out")
    assert "clipcid embed --texts FILE" in raised.value.fix
