"""A folder of texts and their embeddings, without images.

    texts.arrow                    column `text`, as many rows a batch as a file of embeddings has
    text_emb/text_emb_0000.npy     float16 [n, D], unit rows, of the first batch
    manifest.parquet, texts.json   as for images

The texts are mapped: a text takes no memory until it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.command import texts_command
from clipcid_cli.formats.embeddings.manifest import MANIFEST, open_recorded
from clipcid_cli.formats.embeddings.rows import FileRows, Kind, Rows
from clipcid_cli.formats.files import atomic_file
from clipcid_cli.formats.fingerprint import FileRecord, Memo, record_together, validate_unchanged
from clipcid_cli.formats.output import unfinished
from clipcid_cli.formats.sidecar import TextsSidecar, read_sidecar, sidecar_path

TEXTS = "texts"
"""Name of the sidecar."""
TEXTS_FILE = "texts.arrow"

_SCHEMA = pa.schema([("text", pa.large_string())])


def write_texts(folder: Path, batches: Iterable[list[str]]) -> None:
    """Write texts, those of one file of embeddings a batch."""
    with atomic_file(folder / TEXTS_FILE) as target, pa.ipc.new_file(target, _SCHEMA) as writer:
        for texts in batches:
            writer.write_batch(pa.record_batch([pa.array(texts, pa.large_string())], schema=_SCHEMA))


@dataclasses.dataclass(frozen=True)
class TextLines:
    """The texts in a file; picklable, mapped where they are read."""

    path: str

    def __getitem__(self, row: int) -> str:
        batches = _map_batches(self.path)
        index, place = divmod(row, batches[0].num_rows)  # all batches but the last are of one size
        text: str = batches[index][0][place].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        for batch in _map_batches(self.path):
            yield from batch[0].to_pylist()

    def batch_sizes(self) -> list[int]:
        """Return the number of texts of each file of embeddings."""
        return [batch.num_rows for batch in _map_batches(self.path)]


@lru_cache(maxsize=1)
def _map_batches(path: str) -> list[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(path))
        return [reader.get_batch(index) for index in range(reader.num_record_batches)]
    except (OSError, pa.ArrowInvalid) as error:
        raise ClipcidError(
            f"{path} cannot be read: {' '.join(str(error).split())}.", _remake(Path(path).parent)
        ) from error


@dataclasses.dataclass(frozen=True)
class EmbeddedTexts:
    """Finished embeddings of texts; `rows` are [N, D]."""

    folder: Path
    sidecar: TextsSidecar
    lines: TextLines
    rows: Rows
    records: tuple[FileRecord, ...]

    def fingerprints(self) -> list[FileRecord]:
        texts = [file for file in self.sidecar.outputs if file.path == TEXTS_FILE]
        return [*texts, record_together(str(self.folder / Kind.TEXTS), self.records)]


def open_texts(folder: Path, model: str | None = None) -> EmbeddedTexts:
    """Open a folder that `embed --texts` finished with a model, where that is known."""
    path = sidecar_path(folder, TEXTS)
    sidecar = read_sidecar(path, TextsSidecar, _remake(folder))
    if sidecar is None:
        state = "The embeddings of texts are unfinished" if unfinished(folder, TEXTS) else "There are none"
        raise ClipcidError(f"{state} in {folder}.", f"Run: {texts_command(model, out=folder)}")
    fix = _remake(folder, sidecar)
    memo = Memo()
    validate_unchanged(folder, sidecar.outputs, path, fix, memo)
    records, shards = open_recorded(folder, memo, fix)
    files = [rows[Kind.TEXTS] for rows in shards]
    lines = TextLines(str(folder / TEXTS_FILE))
    if [file.shape[0] for file in files] != lines.batch_sizes():
        raise ClipcidError(f"{folder / MANIFEST} records other numbers of texts than {folder / TEXTS_FILE} holds.", fix)
    rows = FileRows(files, files[0].shape[1], as_stored=True)
    return EmbeddedTexts(folder, sidecar, lines, rows, tuple(record.files[Kind.TEXTS] for record in records))


def _remake(folder: Path, sidecar: TextsSidecar | None = None) -> str:
    model = None if sidecar is None else sidecar.model.spec
    texts = None if sidecar is None or not sidecar.inputs else sidecar.inputs[0].path
    return f"Make it again: {texts_command(model, texts, out=folder, overwrite=True)}"
