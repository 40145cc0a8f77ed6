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
from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.embeddings.command import texts_command
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.manifest import MANIFEST, open_recorded, record_together
from clipcid_cli.formats.embeddings.row_files import RowFile
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.fingerprint import FileRecord, Memo, refuse_changed
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
    files: tuple[RowFile, ...]
    sidecar: TextsSidecar

    @property
    def lines(self) -> TextLines:
        """The texts themselves."""
        return TextLines(str(self.folder / TEXTS_FILE))

    @property
    def width(self) -> int:
        """Width D of the embeddings."""
        return self.files[0].shape[1]

    @property
    def total(self) -> int:
        """Number of texts."""
        return sum(file.shape[0] for file in self.files)

    def rows(self) -> Rows:
        """Map the embeddings, [N, D]."""
        return Rows(self.files, self.width, as_stored=True)

    def fingerprints(self) -> list[FileRecord]:
        """Describe texts and embeddings, for a sidecar."""
        texts = [each for each in self.sidecar.outputs if each.path == TEXTS_FILE]
        rows = [FileRecord(file.label, file.size, str(file.hash)) for file in self.files]
        return [*texts, record_together(str(self.folder / Kind.TEXTS), rows)]


def open_texts(folder: Path, model: str | None = None) -> EmbeddedTexts:
    """Open a folder that `embed --texts` finished.

    Args:
        model: Which model should have embedded them, where that is known.
    """
    path = sidecar_path(folder, TEXTS)
    sidecar = read_sidecar(path, TextsSidecar, _remake(folder))
    if sidecar is None:
        state = "The embeddings of texts are unfinished" if unfinished(folder, TEXTS) else "There are none"
        raise ClipcidError(f"{state} in {folder}.", f"Run: {texts_command(model, out=folder)}")
    fix, memo = _remake(folder, sidecar), Memo()
    refuse_changed(folder, sidecar.outputs, path, fix, memo)
    files = tuple(rows[Kind.TEXTS] for rows in open_recorded(folder, memo, fix).rows)
    sizes = TextLines(str(folder / TEXTS_FILE)).batch_sizes()
    if [file.shape[0] for file in files] != sizes:
        raise ClipcidError(f"{folder / MANIFEST} records other numbers of texts than {folder / TEXTS_FILE} holds.", fix)
    return EmbeddedTexts(folder, files, sidecar)


def _remake(folder: Path, sidecar: TextsSidecar | None = None) -> str:
    model = texts = None
    if sidecar is not None:
        model, texts = sidecar.model.spec, next((each.path for each in sidecar.inputs), None)
    return f"Make it again: {texts_command(model, texts, out=folder, overwrite=True)}"
