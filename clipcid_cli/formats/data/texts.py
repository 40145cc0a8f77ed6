"""Texts without images: a file with a text a line, read in slices of as many texts as a file of embeddings has rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import LONGEST_CAPTION, ByteRange, Sample
from clipcid_cli.formats.data.shard import Slices, cut
from clipcid_cli.formats.files import reading
from clipcid_cli.formats.fingerprint import stamp_of
from clipcid_cli.formats.skips import Skips

TEXTS_A_SHARD = 65_536
_MOST_BYTES = 4 * LONGEST_CAPTION + 8  # of a line that is long enough, whatever its letters
_GIVE = "Give --texts a file with one text per line."


class _Place(NamedTuple):
    byte: int = 0
    line: int = 0


@dataclasses.dataclass(frozen=True)
class _TextLines(Slices):
    """The lines of a file that are not empty."""

    path: Path
    bounds: tuple[_Place, ...]  # where each slice begins, and where the last ends
    total: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def read(self, number: int, skips: Skips) -> Iterator[Sample]:
        start, end = self.bounds[number : number + 2]
        row = number * TEXTS_A_SHARD
        for text, place in _read_lines(self.path, start):
            if text:
                yield Sample(str(row), ByteRange(""), (text,))
                row += 1
            else:
                skips.add("empty_line", f"line {place.line:,}")
            if place.byte >= end.byte:
                return

    def stamp(self, number: int) -> tuple[int, ...]:
        return stamp_of(self.path.stat())

    def fingerprint(self, number: int) -> tuple[int, str]:
        start, end = self.bounds[number : number + 2]
        with reading(self.path, "a text file", _GIVE), self.path.open("rb") as file:
            file.seek(start.byte)
            content = file.read(end.byte - start.byte)
        return len(content), f"blake2b:{hashlib.blake2b(content, digest_size=16).hexdigest()}"


def open_texts(path: Path) -> Dataset:
    """Open a file of texts: samples with a caption and no image, whose keys are the numbers of the texts from 0.

    All of it is read once: lines must be UTF-8, hold no NUL and be no longer than `LONGEST_CAPTION`.
    """
    bounds = [_Place()]
    total = 0
    place = _Place()
    for text, end in _read_lines(path, _Place()):
        if text and total and not total % TEXTS_A_SHARD:
            bounds.append(place)
        total += bool(text)
        place = end
    if not total:
        raise ClipcidError(f"{path} holds no text: it has {place.line:,} lines, all empty.", _GIVE)
    return Dataset(str(path), "texts", cut(_TextLines(path, (*bounds, place), total), str(path)))


def _read_lines(path: Path, start: _Place) -> Iterator[tuple[str, _Place]]:
    """Yield each line, stripped, and where it ends."""
    place, number = start
    with reading(path, "a text file", _GIVE), path.open("rb") as lines:
        lines.seek(place)
        while line := lines.readline(_MOST_BYTES):
            place += len(line)
            number += 1
            yield _decode(path, number, line), _Place(place, number)


def _decode(path: Path, number: int, line: bytes) -> str:
    if b"\0" in line:
        raise ClipcidError(f"{path}, line {number:,}, holds a NUL character.", "Remove it: a text has none.")
    try:
        text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode().strip()
    except UnicodeDecodeError as error:
        if len(line) < _MOST_BYTES:
            raise ClipcidError(
                f"{path}, line {number:,}, is not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}.",
                "Save the file as UTF-8.",
            ) from error
        text = ""  # cut within a letter
    if len(line) == _MOST_BYTES or len(text) > LONGEST_CAPTION:
        raise ClipcidError(
            f"{path}, line {number:,}, is longer than {LONGEST_CAPTION:,} characters.",
            "Put one text on each line: a model reads about 300 characters of it.",
        )
    return text
