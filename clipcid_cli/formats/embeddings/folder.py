"""A folder of embeddings, of `embed` or of another tool: rows by kind, and the columns of the metadata beside them.

Rows of another tool that have another number format, or are not unit rows, are normalised and cast to float16 when they are
read, each row by itself.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.embeddings.copies import Copies
from clipcid_cli.formats.embeddings.layouts import AGAIN, EmbeddingFile, find_files
from clipcid_cli.formats.embeddings.manifest import ShardRecord, open_recorded, validate_replaceable
from clipcid_cli.formats.embeddings.rows import COUNTS_COLUMN, METADATA, FileRows, Kind, RowFile, RowMap, Rows, find_npy
from clipcid_cli.formats.files import write_npy
from clipcid_cli.formats.fingerprint import (
    FileRecord,
    Memo,
    identity_of,
    memo_table,
    record_together,
    validate_unchanged,
)
from clipcid_cli.formats.join import Listing, Values, find_repeat
from clipcid_cli.formats.output import unfinished
from clipcid_cli.formats.parquet import column_names, read_columns, read_first_column, replace_invalid
from clipcid_cli.formats.sidecar import EmbedSidecar, ModelRecord, read_sidecar, run_again, sidecar_path

MAX_UNPACKED = 4 * 2**30
"""Limit on the memory of each process for compressed arrays, all files together."""
# Names generated at once for rows without keys: Python's strings take several times the memory of Arrow's.
_NAMES_AT_ONCE = 65_536
_TEXT = pa.large_string()
KEY_COLUMN = "key"
# Of metadata without one, in this order.
_OTHER_KEYS = ("image_path", "uid")
_COPIES = ".rows"
_COPY = "Or copy the rows to another folder, without embed.json, and name that one."


class Embeddings:
    """The embeddings of one model over one data set."""

    # The weight of each teacher whose rows are joined in these; see `combined.py`.
    weights: tuple[float, ...] = (1.0,)
    lacking: tuple[int, ...] = (0,)  # how many of the rows each of them has not
    # What rows of images and views are multiplied by; None where they are read as they are stored.
    image_map: RowMap | None = None

    def __init__(
        self,
        folder: Path,
        files: Sequence[EmbeddingFile],
        sidecar: EmbedSidecar | None,
        memo: Memo,
        records: Sequence[ShardRecord] = (),
        keys: str = "sample",
        key_column: str = KEY_COLUMN,
        work: Path | None = None,
    ) -> None:
        """Take the files of each shard, and of a folder of `embed` what its manifest records."""
        self.folder = folder
        self.sidecar = sidecar  # of `embed`; None for a folder of another tool
        self.width = files[0].parts[Kind.IMAGES].shape[1]
        self.kinds = frozenset(kind for file in files for kind in file.parts)
        firsts = [0, *accumulate(file.rows for file in files)]
        self.num_rows = firsts.pop()
        if not self.num_rows:
            raise ClipcidError(f"{folder} contains {len(files)} files of embeddings, all empty.", "Embed again.")
        self.files = tuple(dataclasses.replace(file, first=first) for file, first in zip(files, firsts, strict=True))
        self._memo = memo
        self._work = work
        self._records = records
        self._keys = keys
        self._key_columns = tuple(dict.fromkeys((key_column, KEY_COLUMN, *_OTHER_KEYS)))

    @property
    def members(self) -> tuple[Embeddings, ...]:
        """The embeddings of each teacher."""
        return (self,)

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that name them."""
        return {"embeddings": tuple(member.folder for member in self.members)} | (
            {"teacher_weight": self.weights} if len(self.weights) > 1 else {}
        )

    @property
    def model(self) -> ModelRecord | None:
        """The model that made them, where `embed` recorded it."""
        return None if self.sidecar is None else self.sidecar.model

    @property
    def shards(self) -> list[str]:
        """The names of the shards that `embed` recorded; none of another tool's folder."""
        return [str(record.input.shard) for record in self._records]

    @property
    def is_verified(self) -> bool:
        """Whether `embed` wrote the files: all rows are then unit float16."""
        return self.sidecar is not None

    @property
    def has_texts(self) -> bool:
        return Kind.TEXTS in self.kinds

    def rows(self, kind: Kind) -> Rows:
        """Open the rows of a kind, [N, D]; where a sample has several, [N·V, D]: row v of sample i is i·V + v."""
        rows = self._open_rows(kind)
        if self.image_map is None or kind not in (Kind.IMAGES, Kind.VIEWS):
            return rows
        return self.image_map.apply(rows)

    def _open_rows(self, kind: Kind) -> Rows:
        """Open the rows of a kind as they are stored."""
        if kind not in self.kinds:
            raise ClipcidError(
                f"{self.folder} contains no text embeddings.",
                f"Embed captions too; the data needs some. {self.embed_again(text=True)}",
            )
        files = [file.parts[kind] for file in self.files if kind in file.parts]
        if (size := sum(file.unpacked for file in files)) > MAX_UNPACKED:
            raise ClipcidError(
                f"The arrays in {self.folder} are compressed, so that they cannot be mapped: unpacked, they take "
                f"{size / 2**30:.1f} GiB of memory, more than the allowed {MAX_UNPACKED / 2**30:g} GiB.",
                "Save them uncompressed: numpy.savez(new, **numpy.load(old)).",
            )
        is_params = kind is Kind.VIEW_PARAMS
        return FileRows(files, files[0].shape[-1], as_stored=self.is_verified or is_params)

    def embed_again(self, **flags: Any) -> str:
        """Return the fix that makes them anew with some flags; those of another tool are not replaced."""
        if self.sidecar is None:
            return f"Run: {command_line('embed', 'DATA', model='MODEL', **flags)}"
        return run_again("embed", self.sidecar, **flags)

    def mapped(self, image_map: RowMap) -> Embeddings:
        """Return them with other rows of images and views."""
        other = copy.copy(self)
        other.image_map = image_map
        return other

    def num_each(self, kind: Kind) -> int:
        """Return how many rows of a kind each sample has: V of views, W of variants; 0 where there are none."""
        return self.files[0].parts[kind].shape[1] if kind in self.kinds else 0

    @property
    def key_column(self) -> str | None:
        """The column of the metadata that holds the keys; None where file and row are the key."""
        columns = self.metadata_columns
        return next((name for name in self._key_columns if name in columns), None)

    @property
    def metadata_columns(self) -> list[str]:
        """The columns of the metadata; none where there are no metadata."""
        metadata = self.files[0].metadata
        return [] if metadata is None else column_names(metadata, AGAIN)

    @property
    def key_rule(self) -> str | None:
        """How keys are made of another tool's metadata; `embed` has made those of its own folders."""
        if self.is_verified:
            return None
        return self._keys if self._key_columns[0] == KEY_COLUMN else f"{self._keys}, by {self._key_columns[0]}"

    def keys_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read the keys of one file's rows from the column that was named, else the usual ones; else file and row."""
        name = file.name
        keys = _read_column(file, self._key_columns, lambda row: f"{name}/{row}")
        if keys.null_count:
            raise ClipcidError(
                f"{file.metadata}: {keys.null_count:,} of {file.rows:,} rows have no key in column {self.key_column}.",
                "Fill that column, or name another one: --key-column NAME",
            )
        if self.is_verified or self._keys == "sample":
            return keys
        shards = self.shards_of(file).combine_chunks()
        return pa.chunked_array([pc.binary_join_element_wise(shards, keys.combine_chunks(), pa.scalar("/", _TEXT))])

    def shards_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read the names of the shards of one file's rows; the file's name where another tool did not record them."""
        name = file.name
        return _read_column(file, ("shard",), lambda row: name).fill_null("")

    def captions_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read the captions of one file's rows: column ``caption``, else DataComp's ``text``; empty where there is none."""
        return replace_invalid(_read_column(file, ("caption", "text"), lambda row: "").fill_null(""))

    def take_column(
        self, read: Callable[[EmbeddingFile], pa.ChunkedArray], numbers: npt.NDArray[np.signedinteger[Any]]
    ) -> Iterator[pa.Array]:
        """Yield a column of the metadata at some rows, in pieces; one file's column is in memory at a time.

        Args:
            read: Reads the column of one file, as `keys_of` does.
            numbers: Numbers of the rows, integers [n], ascending.
        """
        # Of another type, all would be converted.
        firsts = np.array([file.first for file in self.files], numbers.dtype)
        bounds = np.searchsorted(numbers, firsts).tolist()
        for file, start, stop in zip(self.files, bounds, [*bounds[1:], len(numbers)], strict=True):
            if start < stop:
                column = read(file)
                whole = stop - start == file.rows
                yield from (column if whole else column.take(pa.array(numbers[start:stop] - file.first))).chunks

    def counts_of(self, file: EmbeddingFile) -> npt.NDArray[np.int64]:
        """Read how many captions of each of one file's rows are embedded, int64 [n]."""
        counts = np.ones(file.rows, dtype=np.int64)
        further = file.parts.get(Kind.FURTHER)
        if further is None or file.metadata is None:
            return counts
        if COUNTS_COLUMN in column_names(file.metadata, AGAIN):
            counts = read_columns(file.metadata, {COUNTS_COLUMN: pa.int64()}, AGAIN)[COUNTS_COLUMN].to_numpy()
        more = int(counts.sum()) - file.rows
        if len(counts) != file.rows or int(counts.min(initial=1)) < 1 or more != further.shape[0]:
            raise ClipcidError(
                f"{further.path} has {further.shape[0]:,} rows; {file.metadata} counts {more:,} captions after the first.",
                AGAIN,
            )
        return counts

    def listing(self) -> Listing:
        """List the keys, one file in memory at a time.

        The numbers of a key are its row and, where captions after the first are embedded, the first row of its own among
        them and how many captions it has.
        """
        has_further = Kind.FURTHER in self.kinds

        def read() -> Iterator[tuple[pa.Array, Values]]:
            further = 0
            for file in self.files:
                columns = [np.arange(file.first, file.first + file.rows, dtype=np.int64)]
                if has_further:
                    counts = self.counts_of(file)
                    ends = further + np.cumsum(counts - 1)
                    columns += [ends - (counts - 1), counts]
                    further = int(ends[-1]) if len(ends) else further
                yield self.keys_of(file).combine_chunks(), np.stack(columns, axis=1)

        return Listing(self.folder, read, 3 if has_further else 1)

    @property
    def has_uids(self) -> bool:
        return "uid" in self.metadata_columns

    def uids_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read DataComp's identifiers of one file's rows, strings; empty where the metadata have no column ``uid``."""
        return _read_column(file, ("uid",), lambda row: "").fill_null("")

    def contents(self, part: str) -> list[FileRecord]:
        """Describe each shard's file of a kind or of metadata, where it has one."""
        if self.is_verified:
            return [record.files[part] for record in self._records if part in record.files]
        files = self._files_of(part)
        read = [file for file in files if not isinstance(file, RowFile) or file.hash is None]
        hashed = iter(self._memo.record_all([file.path if isinstance(file, RowFile) else file for file in read]))
        self._memo.save()

        def describe(file: RowFile | Path) -> FileRecord:
            if isinstance(file, RowFile) and file.hash:
                return FileRecord(file.label, file.size, file.hash)
            file_record = next(hashed)
            if isinstance(file, RowFile) and file.source is not None:
                return msgspec.structs.replace(file_record, path=file.label, time=0)
            return file_record

        return list(map(describe, files))

    def fingerprints(self, kinds: Collection[Kind] = ()) -> list[FileRecord]:
        """Describe images, metadata and further `kinds` that are there, and the map of images, as inputs for a sidecar."""
        files = self._describe_files(kinds)
        return files if self.image_map is None else [*files, self.image_map.record]

    def _describe_files(self, kinds: Collection[Kind]) -> list[FileRecord]:
        if self.sidecar is not None:
            validate_replaceable(self.folder, self._records, self._memo, f"{self.embed_again()}\n{_COPY}")
        parts = [part for part in (Kind.IMAGES, METADATA, *kinds) if self._files_of(part)]
        return [record_together(self._name_together(part), self.contents(part)) for part in parts]

    def _files_of(self, part: str) -> list[RowFile | Path]:
        if part == METADATA:
            return [file.metadata for file in self.files if file.metadata is not None]
        return [file.parts[Kind(part)] for file in self.files if part in file.parts]

    def _name_together(self, part: str) -> str:
        """Return the folder of the files of a kind, with the array's name where they are archives."""
        file = self._files_of(part)[0]
        path, member = (file.origin, file.member) if isinstance(file, RowFile) else (file, None)
        place = path if path == self.folder else path.parent
        return str(place) if member is None else f"{place}[{member}]"

    def validate_unique_keys(self) -> None:
        """Refuse keys of two rows in a folder of another tool; `embed` has checked its own."""
        if self.is_verified:
            return
        repeat = find_repeat(lambda: map(self.keys_of, self.files), self._work)
        if repeat is not None:
            key, one, other = repeat
            raise ClipcidError(
                f"Key {key!r} belongs to rows {one:,} and {other:,} of {self.folder}.",
                "Add --keys shard, which puts the shard's name before each key, or give the rows distinct keys.",
            )

    def find_bad_rows(self, *, texts: bool) -> npt.NDArray[np.int64]:
        """Find rows that are zero or not finite, int64, ascending: their distances to others are undefined.

        With `texts` the text embeddings count too, where there are any. `embed` leaves such rows out, so that its folders
        are not read for this; of others the answer is remembered.
        """
        if self.is_verified:
            return np.empty(0, dtype=np.int64)
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
            bad += [start + np.flatnonzero(~_is_usable(block)) for start, block in self.rows(kind).blocks()]
        numbers = np.unique(np.concatenate(bad))
        if remembered is not None:
            with suppress(ClipcidError):  # a work directory that is read-only
                write_npy(remembered, numbers)
        return numbers


def has_usable_row(rows: Rows) -> bool:
    """Tell whether any row is neither zero nor not finite; rows are read until one is found."""
    return any(_is_usable(block).any() for _, block in rows.blocks())


def _is_usable(block: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(block).all(axis=1) & block.any(axis=1))


def _read_column(file: EmbeddingFile, names: tuple[str, ...], default: Callable[[int], str]) -> pa.ChunkedArray:
    """Read the first of some columns that the metadata have; else make the defaults."""
    column = None if file.metadata is None else read_first_column(file.metadata, names, _TEXT, AGAIN)
    if column is not None:
        if len(column) != file.rows:
            raise ClipcidError(f"{file.metadata} has {len(column):,} rows; {file.rows:,} were found before.", AGAIN)
        return column
    pieces = (range(file.rows)[at : at + _NAMES_AT_ONCE] for at in range(0, file.rows, _NAMES_AT_ONCE))
    return pa.chunked_array([pa.array(map(default, piece), _TEXT) for piece in pieces], type=_TEXT)


def read_embed_sidecar(folder: Path) -> EmbedSidecar | None:
    """Read the sidecar of a folder of embeddings; None when there is none."""
    return read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar, f"{run_again('embed', None)}\n{_COPY}")


def open_embeddings(
    folder: Path,
    keys: str = "sample",
    array: str | None = None,
    work: Path | None = None,
    key_column: str = KEY_COLUMN,
) -> Embeddings:
    """Open a folder of embeddings.

    Args:
        keys: ``shard`` puts the shard's name before each key of another tool's folder; the keys of `embed` are as its own
            option made them.
        array: Name of the array in each ``.npz``, or of the column in parquet files; None for the only one of images.
        work: Work directory, for scratch files, copies of what cannot be mapped, and to remember which rows are unusable;
            None has neither.
        key_column: Column of another tool's metadata with the keys; where there is none, the usual ones.
    """
    sidecar = read_embed_sidecar(folder)
    memo = Memo(memo_table(folder))
    if sidecar is None:
        if unfinished(folder, "embed"):
            raise ClipcidError(
                f"The embeddings in {folder} are unfinished.", "Run the same embed command again: it continues."
            )
        files = find_files(folder, array, Copies(None if work is None else work / _COPIES))
        return Embeddings(folder, files, None, memo, keys=keys, key_column=key_column, work=work)
    fix = f"{run_again('embed', sidecar)}\n{_COPY}"
    validate_unchanged(folder, sidecar.outputs, sidecar_path(folder, "embed"), fix, memo)
    records, rows = open_recorded(folder, memo, fix)
    metadata = (folder / record.files[METADATA].path for record in records)
    return Embeddings(folder, list(map(EmbeddingFile, rows, metadata)), sidecar, memo, records, work=work)
