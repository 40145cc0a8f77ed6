"""A folder of texts and their embeddings, without images.

    texts.arrow                    column `text`, as many rows a batch as a file of embeddings has
    text_emb/text_emb_0000.npy     float16 [n, D], unit rows, of the first batch
    texts.json                     the sidecar

The texts are mapped: a text takes no memory until it is read.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import cast

import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.embeddings.command import texts_command
from clipcid_cli.formats.embeddings.npy import NpyFile, find_npy
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.fingerprint import FileRecord, record, refuse_changed
from clipcid_cli.formats.output import is_claimed, unfinished
from clipcid_cli.formats.reading import reading_from
from clipcid_cli.formats.sidecar import TextsSidecar, read_sidecar, sidecar_path

STEP = "texts"
"""Name of the sidecar."""
TEXTS_A_FILE = 65_536
LONGEST_LINE = 8_192
"""Characters of a text; a tokenizer reads no more of one."""

_SCHEMA = pa.schema([("text", pa.large_string())])
_GIVE = "Give --texts a file with a text a line."


def _remake(folder: Path, sidecar: TextsSidecar | None = None) -> str:
    model = texts = None
    if sidecar is not None:
        model, texts = sidecar.model.spec, next((each.path for each in sidecar.inputs), None)
    return f"Make it again: {texts_command(model, texts, out=folder, overwrite=True)}"


def texts_path(folder: Path) -> Path:
    """Return the path of the texts."""
    return folder / "texts.arrow"


def rows_path(folder: Path, number: int) -> Path:
    """Return the path of a file of embeddings."""
    return folder / "text_emb" / f"text_emb_{number:04d}.npy"


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse a folder with embeddings that `embed --texts` did not write, since it would replace and remove files there.

    Raises:
        ClipcidError: when there are any.
    """
    if is_claimed(folder, "embed"):
        raise ClipcidError(
            f"{folder} holds embeddings of images.", "Choose another folder for those of texts alone with --out."
        )
    refuse_foreign_rows(folder, STEP, ("text_emb", "img_emb"))


def refuse_foreign_rows(folder: Path, step: str, kinds: Iterable[str]) -> None:
    """Refuse a folder with rows of such kinds that `step` did not write.

    Raises:
        ClipcidError: naming the first of them.
    """
    first = next((path for kind in kinds for path in sorted((folder / kind).glob("*.npy"))), None)
    if first is not None and not is_claimed(folder, step):
        raise ClipcidError(
            f"{folder} contains embeddings that clipcid did not write, such as {first}.",
            "Choose another folder with --out, or remove them.",
        )


def copy_texts(source: Path, folder: Path) -> TextCounts:
    """Copy the lines of a text file into `folder`, some at a time; the arguments of errors are those of `read_texts`."""
    counts, batch = TextCounts(), list[str]()
    with atomic_file(texts_path(folder)) as target, pa.ipc.new_file(target, _SCHEMA) as writer:
        for text in read_texts(source, counts):
            batch.append(text)
            if len(batch) == TEXTS_A_FILE:
                writer.write_batch(_make_batch(batch))
                batch.clear()
        if batch:
            writer.write_batch(_make_batch(batch))
    return counts


def _make_batch(texts: list[str]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(texts, pa.large_string())], schema=_SCHEMA)


@dataclasses.dataclass
class TextCounts:
    """How many texts a file holds, and how many empty lines, which are left out."""

    texts: int = 0
    empty: int = 0


def read_texts(source: Path, counts: TextCounts) -> Iterator[str]:
    """Yield the texts of a file, a line each, and count them.

    Raises:
        ClipcidError: when the file cannot be read, a line is not UTF-8, has a NUL or is too long, or all are empty.
    """
    with (
        reading_from(source, "a text file", _GIVE) as file,
        io.BufferedReader(cast(io.RawIOBase, file)) as lines,  # `reading_from` opens it unbuffered
    ):
        for text in _read_lines(source, lines):
            counts.texts, counts.empty = counts.texts + bool(text), counts.empty + (not text)
            if text:
                yield text
    if not counts.texts:
        raise ClipcidError(f"{source} holds no text: it has {counts.empty:,} lines, all empty.", _GIVE)


def _read_lines(source: Path, lines: io.BufferedIOBase) -> Iterator[str]:
    most = 4 * LONGEST_LINE + 8  # bytes of a line that is long enough, whatever its letters
    number = 0
    while line := lines.readline(most):
        number += 1
        if b"\0" in line:
            raise ClipcidError(f"{source}, line {number:,}, holds a NUL character.", "Remove it: a text has none.")
        try:
            text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode().strip()
        except UnicodeDecodeError as error:
            if len(line) < most:
                raise ClipcidError(
                    f"{source}, line {number:,}, is not UTF-8: byte {error.start + 1} is {line[error.start]:#04x}.",
                    "Save the file as UTF-8.",
                ) from error
            text = " " * most  # cut within a letter
        if len(line) == most or len(text) > LONGEST_LINE:
            raise ClipcidError(
                f"{source}, line {number:,}, is longer than {LONGEST_LINE:,} characters.",
                "Give a text a line: a model reads some 300 characters of one.",
            )
        yield text


@dataclasses.dataclass(frozen=True)
class TextLines:
    """The texts of a folder; picklable, mapped where they are read.

    Attributes:
        path: Of the texts.
    """

    path: str

    def __getitem__(self, row: int) -> str:
        """Read a text."""
        number, place = divmod(row, _open_batch(self.path, 0).num_rows)  # all batches but the last are of one size
        text: str = _open_batch(self.path, number)[0][place].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        """Read them all, in order."""
        for number in range(_open(self.path).num_record_batches):
            yield from _open(self.path).get_batch(number)[0].to_pylist()

    def batch_sizes(self) -> list[int]:
        """Return the number of texts of each file of embeddings."""
        reader = _open(self.path)
        return [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]


@lru_cache(maxsize=1)
def _open(path: str) -> pa.ipc.RecordBatchFileReader:
    try:
        return pa.ipc.open_file(pa.memory_map(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise ClipcidError(
            f"{path} cannot be read: {' '.join(str(error).split())}.", _remake(Path(path).parent)
        ) from error


@lru_cache(maxsize=16)
def _open_batch(path: str, number: int) -> pa.RecordBatch:
    return _open(path).get_batch(number)


@dataclasses.dataclass(frozen=True)
class EmbeddedTexts:
    """Finished embeddings of texts.

    Attributes:
        files: Files of the embeddings.
        sidecar: The sidecar.
    """

    folder: Path
    files: tuple[NpyFile, ...]
    sidecar: TextsSidecar

    @property
    def lines(self) -> TextLines:
        """The texts themselves."""
        return TextLines(str(texts_path(self.folder)))

    @property
    def total(self) -> int:
        """Number of texts."""
        return sum(file.shape[0] for file in self.files)

    def rows(self) -> Rows:
        """Map the embeddings, [N, D]."""
        return Rows(self.files, self.files[0].shape[1], as_stored=True)

    def fingerprints(self) -> list[FileRecord]:
        """Describe the files, for a sidecar."""
        return [record(path) for path in (texts_path(self.folder), *(file.path for file in self.files))]


def open_texts(folder: Path, model: str | None = None) -> EmbeddedTexts:
    """Open a folder that `embed --texts` finished.

    Args:
        model: Which model should have embedded them, where that is known.

    Raises:
        ClipcidError: when there is none, it is unfinished, or its files are not those that were written.
    """
    path = sidecar_path(folder, STEP)
    sidecar = read_sidecar(path, TextsSidecar)
    if sidecar is None:
        state = "There are none" if unfinished(folder, STEP) is None else "The embeddings of texts are unfinished"
        raise ClipcidError(f"{state} in {folder}.", f"Run: {texts_command(model, out=folder)}")
    refuse_changed(folder, sidecar.outputs, path, lambda: _remake(folder, sidecar))
    sizes = TextLines(str(texts_path(folder))).batch_sizes()
    files = tuple(find_npy(rows_path(folder, number)) for number in range(len(sizes)))
    for file, size in zip(files, sizes, strict=True):
        if file.dtype != "float16" or len(file.shape) != 2 or file.shape != (size, files[0].shape[1]):
            raise ClipcidError(
                f"{file.path} holds {file.dtype} {list(file.shape)}, beside {size:,} texts.",
                _remake(folder, sidecar),
            )
    return EmbeddedTexts(folder, files, sidecar)
