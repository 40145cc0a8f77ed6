"""A folder of embeddings: rows by kind, and the columns of the metadata beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import COUNTS_COLUMN, METADATA, Kind
from clipcid_cli.formats.embeddings.manifest import ShardRecord
from clipcid_cli.formats.embeddings.recorded_rows import open_recorded, validate_replaceable
from clipcid_cli.formats.embeddings.rows import AGAIN, ArrayFile, EmbeddingFile, FileRows, Rows
from clipcid_cli.formats.embeddings.sidecar import COPY, EmbedSidecar, read_embed_sidecar
from clipcid_cli.formats.fingerprint import FileRecord, hash_json, record_together, validate_unchanged
from clipcid_cli.formats.join import Listing, Values
from clipcid_cli.formats.memo import Memo, memo_table
from clipcid_cli.formats.parquet import column_names, read_columns, read_first_column, replace_invalid
from clipcid_cli.formats.sidecar import run_again, sidecar_path
from clipcid_cli.formats.skipped import SKIPPED
from clipcid_cli.formats.work_directory import FolderName, WorkDirectory
from clipcid_cli.records import ModelRecord
from clipcid_cli.shown import short_name

if TYPE_CHECKING:
    from clipcid_cli.formats.data.dataset import Dataset
    from clipcid_cli.formats.embeddings.mapped import RowMap

# Names generated at once for rows without keys: Python's strings take several times the memory of Arrow's.
_NAMES_AT_ONCE = 65_536
TEXT = pa.large_string()
KEY_COLUMN = "key"


class Embeddings:
    """The embeddings of one model over one data set, as `embed` wrote them."""

    _as_stored = True  # whether all rows are unit float16
    _key_columns: tuple[str, ...] = (KEY_COLUMN,)  # which hold the keys, the first that is there

    unusable = "zero or not finite"  # what rows are that `find_bad_rows` finds, in words
    # What rows of images and views are multiplied by; None where they are read as they are stored.
    image_map: RowMap | None = None

    def __init__(
        self,
        folder: Path,
        files: Sequence[EmbeddingFile],
        sidecar: EmbedSidecar | None,
        memo: Memo,
        records: Sequence[ShardRecord] = (),
    ) -> None:
        """Take the files of each shard, and what the manifest records of them."""
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
        self._records = records

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that name them."""
        return {"embeddings": self.folder}

    def name_in(self, work: WorkDirectory) -> FolderName:
        """Return their name for sidecars in a work directory."""
        return work.name_of(self.folder)

    def slug_in(self, work: WorkDirectory) -> str:
        """Return a name for a folder of what is made of them, which no other embeddings give."""
        name = work.name_of(self.folder)
        return f"{Path(name).name}-{hash_json(name)[:8]}"

    def listed(self) -> list[tuple[str, str]]:
        """Return what a report says of where they are."""
        return [("embeddings", str(self.folder))]

    def skipped(self) -> dict[Path, int]:
        """Return how many samples `embed` skipped, by the file that lists them."""
        return {} if self.sidecar is None else {self.folder / SKIPPED: sum(self.sidecar.counts["skipped"].values())}

    def part_that_lacks(self, samples: int) -> Embeddings:
        """Return the embeddings that an error names where these lack so many samples."""
        return self

    @property
    def model_name(self) -> str | None:
        """The name of the model for people, where `embed` recorded it."""
        return None if self.model is None else short_name(self.model.spec)

    @property
    def model(self) -> ModelRecord | None:
        """The model that made them, where `embed` recorded it."""
        return None if self.sidecar is None else self.sidecar.model

    @property
    def shards(self) -> list[str]:
        """The names of the shards that `embed` recorded; none of another tool's folder."""
        return [str(record.input.shard) for record in self._records]

    @property
    def has_texts(self) -> bool:
        return Kind.TEXTS in self.kinds

    def rows(self, kind: Kind) -> Rows:
        """Open the rows of a kind, [N, D]; where a sample has several, [N·V, D]: row v of sample i is i·V + v."""
        rows = self._open_rows(kind)
        return rows if self.image_map is None else self.image_map.apply(kind, rows)

    def _open_rows(self, kind: Kind) -> Rows:
        """Open the rows of a kind as they are stored."""
        if kind not in self.kinds:
            raise ClipcidError(
                f"{self.folder} contains no text embeddings.",
                f"Embed captions too; the data needs some. {self.embed_again(text=True)}",
            )
        files = [file.parts[kind] for file in self.files if kind in file.parts]
        is_params = kind is Kind.VIEW_PARAMS
        return FileRows(files, files[0].shape[-1], as_stored=self._as_stored or is_params)

    def embed_again(self, **flags: Any) -> str:
        """Return the fix that makes them anew with some flags."""
        return run_again("embed", self.sidecar, **flags)

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
        """How keys are made of another tool's metadata; None where `embed` has made them."""
        return None

    def keys_of(self, file: EmbeddingFile) -> pa.ChunkedArray:
        """Read the keys of one file's rows from the column that was named, else the usual ones; else file and row."""
        name = file.name
        keys = _read_column(file, self._key_columns, lambda row: f"{name}/{row}")
        if keys.null_count:
            raise ClipcidError(
                f"{file.metadata}: {keys.null_count:,} of {file.rows:,} rows have no key in column {self.key_column}.",
                "Fill that column, or name another one: --key-column NAME",
            )
        return keys

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
        return [record.files[part] for record in self._records if part in record.files]

    def fingerprints(self, kinds: Collection[Kind] = ()) -> list[FileRecord]:
        """Describe images, metadata and further `kinds` that are there, and the map of images, as inputs for a sidecar."""
        files = self._describe_files(kinds)
        return files if self.image_map is None else [*files, self.image_map.record]

    def _describe_files(self, kinds: Collection[Kind]) -> list[FileRecord]:
        self._validate_unchanged()
        parts = [part for part in (Kind.IMAGES, METADATA, *kinds) if self._files_of(part)]
        return [record_together(self._name_together(part), self.contents(part)) for part in parts]

    def _validate_unchanged(self) -> None:
        validate_replaceable(self.folder, self._records, self._memo, run_again("embed", self.sidecar, COPY))

    def _files_of(self, part: str) -> list[ArrayFile | Path]:
        if part == METADATA:
            return [file.metadata for file in self.files if file.metadata is not None]
        return [file.parts[Kind(part)] for file in self.files if part in file.parts]

    def _name_together(self, part: str) -> str:
        """Return the folder of the files of a kind, with the array's name where they are archives."""
        file = self._files_of(part)[0]
        path, member = (file.origin, file.member) if isinstance(file, ArrayFile) else (file, None)
        place = path if path == self.folder else path.parent
        return str(place) if member is None else f"{place}[{member}]"

    def validate_unique_keys(self) -> None:
        """Refuse keys of two rows; `embed` has checked its own."""

    def validate_made_as(self, dataset: Dataset, *, captions: bool = True) -> None:
        """Refuse data whose keys or, where they should be the same, `captions` are read in another way than for these."""
        if self.sidecar is None:
            return
        recorded = self.sidecar.made
        captions = captions and self.has_texts
        if captions and recorded.caption_key != dataset.caption_keys:
            wanted = " ".join(f"--caption-key {key}" for key in recorded.caption_key)
            raise ClipcidError(
                f"The embeddings in {self.folder} were made with {wanted or 'no --caption-key'}, the data is read with "
                f"{' '.join(dataset.caption_keys) or 'none'}: captions differ.",
                f"Give {wanted}." if wanted else "Omit --caption-key.",
            )
        if captions and recorded.caption_lines != dataset.caption_lines:
            flag = "--caption-lines" if recorded.caption_lines else "--no-caption-lines"
            raise ClipcidError(
                f"The embeddings in {self.folder} were made with {flag}, the data is read without it: captions differ.",
                f"Add {flag}.",
            )
        if recorded.keys != dataset.keys:
            raise ClipcidError(
                f"The embeddings in {self.folder} were made with --keys {recorded.keys}, the data is read with --keys "
                f"{dataset.keys}: they cannot be joined.",
                f"Add --keys {recorded.keys}.",
            )

    def find_bad_rows(self, *, texts: bool) -> npt.NDArray[np.int64]:
        """Return the rows that are zero or not finite, int64, ascending: their distances to others are undefined.

        There are none, since `embed` leaves them out; embeddings of other tools are searched for them, with `texts` those of
        captions too.
        """
        return np.empty(0, dtype=np.int64)


def has_usable_row(rows: Rows) -> bool:
    """Tell whether any row is neither zero nor not finite; rows are read until one is found."""
    return any(is_usable(block).any() for _, block in rows.blocks())


def is_usable(block: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    """Tell which rows are neither zero nor have a number that is not finite, bool [n]."""
    return np.asarray(np.isfinite(block).all(axis=1) & block.any(axis=1))


def _read_column(file: EmbeddingFile, names: tuple[str, ...], default: Callable[[int], str]) -> pa.ChunkedArray:
    """Read the first of some columns that the metadata have; else make the defaults."""
    column = None if file.metadata is None else read_first_column(file.metadata, names, TEXT, AGAIN)
    if column is not None:
        if len(column) != file.rows:
            raise ClipcidError(f"{file.metadata} has {len(column):,} rows; {file.rows:,} were found before.", AGAIN)
        return column
    pieces = (range(file.rows)[at : at + _NAMES_AT_ONCE] for at in range(0, file.rows, _NAMES_AT_ONCE))
    return pa.chunked_array([pa.array(map(default, piece), TEXT) for piece in pieces], type=TEXT)


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
    if sidecar is None:
        from clipcid_cli.formats.embeddings.foreign import (
            open_foreign,  # of another tool, whose layouts take much to read
        )

        return open_foreign(folder, keys, array, work, key_column)
    memo = Memo(memo_table(folder))
    fix = run_again("embed", sidecar, COPY)
    validate_unchanged(folder, sidecar.outputs, sidecar_path(folder, "embed"), fix, memo)
    records, rows = open_recorded(folder, memo, fix)
    metadata = (folder / record.files[METADATA].path for record in records)
    return Embeddings(folder, list(map(EmbeddingFile, rows, metadata)), sidecar, memo, records)
