"""Texts beside their embeddings are read from where they are mapped."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.text_folder import TEXTS_FILE, TextLines, open_texts, write_texts


def test_texts_are_read_by_their_row(tmp_path: Path) -> None:
    expected = ["a red dog", "ein Löwe", "犬", "last, 1,000", "the very " + "x" * 8_180]
    write_texts(tmp_path, [expected[:3], expected[3:]])
    lines = pickle.loads(pickle.dumps(TextLines(str(tmp_path / TEXTS_FILE))))
    assert [lines[row] for row in range(5)] == expected
    assert list(lines) == expected
    assert lines.batch_sizes() == [3, 2]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="There are none in") as raised:
        open_texts(tmp_path / "out")
    assert "clipcid embed --texts FILE" in raised.value.fix
