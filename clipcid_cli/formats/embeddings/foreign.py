"""A folder of embeddings that another tool wrote.

Rows that have another number format, or are not unit rows, are normalised and cast to float16 when they are read, each row
by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.embeddings.copies import Copies
from clipcid_cli.formats.embeddings.folder import KEY_COLUMN, TEXT, Embeddings, is_usable
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.layouts import find_files
from clipcid_cli.formats.embeddings.rows import ArrayFile, EmbeddingFile, Rows, find_npy
from clipcid_cli.formats.files import write_npy
from clipcid_cli.formats.fingerprint import FileRecord, identity_of
from clipcid_cli.formats.join import find_repeat
from clipcid_cli.formats.memo import Memo, memo_table
from clipcid_cli.formats.output import unfinished

MAX_UNPACKED = 4 * 2**30
"""Limit on the memory of each process for compressed arrays, all files together."""
# Columns of keys in metadata without one of the usual name, in this order.
_OTHER_KEYS = ("image_path", "uid")
_COPIES = ".rows"


def open_foreign(folder: Path, keys: str, array: str | None, work: Path | None, key_column: str) -> ForeignEmbeddings:
    """Open a folder, or a file, of another tool; the arguments are as of `open_embeddings`."""
    if unfinished(folder, "embed"):
        raise ClipcidError(
            f"The embeddings in {folder} are unfinished.", "Run the same embed command again: it continues."
        )
    files = find_files(folder, array, Copies(None if work is None else work / _COPIES))
    return ForeignEmbeddings(folder, files, keys, key_column, work)


class ForeignEmbeddings(Embeddings):
    """Embeddings of another tool: what `embed` records and has checked is found out here."""

    _as_stored = False

    def __init__(
        self, folder: Path, files: Sequence[EmbeddingFile], keys: str, key_column: str, work: Path | None
    ) -> None:
        super().__init__(folder, files, None, Memo(memo_table(folder)))
        self._keys = keys
        self._key_columns = tuple(dict.fromkeys((key_column, KEY_COLUMN, *_OTHER_KEYS)))
        self._work = work

    def _open_rows(self, kind: Kind) -> Rows:
        files = [file.parts[kind] for file in self.files if kind in file.parts]
        if (size := sum(file.unpacked for file in files)) > MAX_UNPACKED:
            raise ClipcidError(
                f"The arrays in {self.folder} are compressed, so that they cannot be mapped: unpacked, they take "
                f"{size / 2**30:.1f} GiB of memory, more than the allowed {MAX_UNPACKED / 2**30:g} GiB.",
                "Save them uncompressed: numpy.savez(new, **numpy.load(old)).",
            )
        return super()._open_rows(kind)

    def embed_again(self, **flags: Any) -> str:
        """Return the command that embeds the data with some flags: what another tool wrote is not replaced."""
        return f"Run: {command_line('embed', 'DATA', model='MODEL', **flags)}"

    @property
    def key_rule(self) -> str:
        return self._keys if self._key_columns[0] == KEY_COLUMN else f"{self._keys}, by {self._key_columns[0]}"

    def keys_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        keys = super().keys_of(file)
        if self._keys == "sample":
            return keys
        shards = self.shards_of(file).combine_chunks()
        return pa.chunked_array([pc.binary_join_element_wise(shards, keys.combine_chunks(), pa.scalar("/", TEXT))])

    def contents(self, part: str) -> list[FileRecord]:
        """Describe each file of a kind or of metadata; what nothing records is hashed."""
        files = self._files_of(part)
        read = [file for file in files if not isinstance(file, ArrayFile) or file.hash is None]
        hashed = iter(self._memo.record_all([file.path if isinstance(file, ArrayFile) else file for file in read]))
        self._memo.save()

        def describe(file: ArrayFile | Path) -> FileRecord:
            if isinstance(file, ArrayFile) and file.hash:
                return FileRecord(file.label, file.size, file.hash)
            file_record = next(hashed)
            if isinstance(file, ArrayFile) and file.source is not None:
                return msgspec.structs.replace(file_record, path=file.label, time=0)
            return file_record

        return list(map(describe, files))

    def _validate_unchanged(self) -> None:
        """Accept the files as they are: nothing records how they were."""

    def validate_unique_keys(self) -> None:
        """Refuse keys of two rows."""
        repeat = find_repeat(lambda: map(self.keys_of, self.files), self._work)
        if repeat is not None:
            key, one, other = repeat
            raise ClipcidError(
                f"Key {key!r} belongs to rows {one:,} and {other:,} of {self.folder}.",
                "Add --keys shard, which puts the shard's name before each key, or give the rows distinct keys.",
            )

    def find_bad_rows(self, *, texts: bool) -> npt.NDArray[np.int64]:
        """Find rows that are zero or not finite, as `Embeddings.find_bad_rows`; the answer is remembered."""
        kinds = [Kind.IMAGES, *([Kind.TEXTS] if texts and self.has_texts else [])]
        remembered = None
        if self._work is not None and self._work.is_dir():
            identity = identity_of({"kinds": kinds}, self.fingerprints(kinds[1:]))
            remembered = self._work / ".bad-rows" / f"{identity}.npy"
            if remembered.is_file():
                with suppress(ClipcidError):
                    return np.array(find_npy(remembered).map(), dtype=np.int64)
        bad = [np.empty(0, dtype=np.int64)]
        for kind in kinds:
            bad += [start + np.flatnonzero(~is_usable(block)) for start, block in self.rows(kind).blocks()]
        numbers = np.unique(np.concatenate(bad))
        if remembered is not None:
            with suppress(ClipcidError):  # a work directory that is read-only
                write_npy(remembered, numbers)
        return numbers
