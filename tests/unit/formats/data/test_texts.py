"""Files of texts as data: every text once, in slices that know their place in the file."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data import texts
from clipcid_cli.formats.data.texts import open_texts
from clipcid_cli.formats.skips import Skips


@pytest.mark.parametrize(
    "lines",
    [
        [b"", b"a", b"", b"b", b"c", b" ", b"d", b""],
        [b"a", *[b"%d" % row for row in range(12)]],
        [b"a", b"b", b"c", b"d"],
        [b"", b"a"],
    ],
)
def test_each_text_is_in_one_slice_and_each_empty_line_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[bytes]
) -> None:
    monkeypatch.setattr(texts, "TEXTS_A_SHARD", 2)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    dataset, skips = pickle.loads(pickle.dumps(open_texts(path))), Skips()
    expected = [line.decode() for line in lines if line.strip()]
    found = [sample for shard in dataset.shards for sample in shard.stream(skips)]
    assert [sample.captions for sample in found] == [(text,) for text in expected]
    assert [sample.key for sample in found] == [str(row) for row in range(len(expected))]
    # What ends without a line break is no further line.
    assert skips.counts.get("empty_line", 0) == len(lines) - len(expected) - (lines[-1] == b"")
    assert dataset.estimate_samples() == len(expected)
    assert [len(shard.samples()) for shard in dataset.shards] == [2] * (len(expected) // 2) + [1] * (len(expected) % 2)
    first = dataset.fingerprints()
    path.write_bytes(path.read_bytes().replace(b"a", b"x"))
    assert [one == other for one, other in zip(first, open_texts(path).fingerprints(), strict=True)] == [
        False,
        *[True] * (len(first) - 1),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text: it has 0 lines"),
        (b"\n \n", "holds no text: it has 2 lines, all empty"),
        (b"a\nb\0c\n", "line 2, holds a NUL character"),
        (b"a\ncaf\xe9\n", "line 2, is not UTF-8: byte 4 is 0xe9"),
        (b"a\n" + b"x" * 8193, "line 2, is longer than 8,192 characters"),
        (b"a\n" + "漢".encode() * 100_000, "line 2, is longer than 8,192 characters"),
    ],
)
def test_what_is_no_file_of_texts_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ClipcidError, match=message) as raised:
        open_texts(path)
    assert raised.value.fix
    path.unlink()
    with pytest.raises(ClipcidError, match="cannot be read"):
        open_texts(path)
