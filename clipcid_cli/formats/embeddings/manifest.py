"""A folder of embeddings as `embed` writes it, shard by shard, and its ``manifest.parquet``: a row a shard, in order.

Each shard is followed by a record, which makes it count as finished; the manifest holds the records of all. Several
processes may write different shards of a folder at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.data.samples import natural_key
from clipcid_cli.formats.embeddings.rows import COUNTS_COLUMN, METADATA, ArrayFile, Kind, find_npy
from clipcid_cli.formats.files import (
    LARGEST_TEXT,
    read_regular,
    reading,
    write_error,
    write_json,
    write_npy,
    write_parquet,
)
from clipcid_cli.formats.fingerprint import FileRecord, Memo, find_changed, identity_of, validate_unchanged
from clipcid_cli.formats.output import find_works
from clipcid_cli.formats.parquet import read_rows
from clipcid_cli.formats.skipped import SKIPPED, make_table, read_shards, read_skipped, write_skipped
from clipcid_cli.formats.skips import Skips

MANIFEST = "manifest.parquet"
# Records of finished shards, until all are finished.
_RECORDS = ".shards"
FINISHED = f"{_RECORDS}/*.json"
"""Pattern of these records in a work folder."""
# Bytes that numpy writes before the values of an array of few dimensions.
_HEADER = 128

_TEXT = pa.string()
_NUMBER = pa.int64()
_INPUT = pa.struct([("shard", _TEXT), ("path", _TEXT), ("size", _NUMBER), ("hash", _TEXT)])
_SKIPPED = pa.list_(pa.struct([("reason", _TEXT), ("count", _NUMBER), ("examples", pa.list_(_TEXT))]))
_FILE = pa.struct([("path", _TEXT), ("size", _NUMBER), ("time", _NUMBER), ("hash", _TEXT)])

Stamp = tuple[int, int]  # inode, time of modification in ns


class Skipped(msgspec.Struct, frozen=True):
    """Samples of a shard that could not be used, for one reason: their number, and the names of the first few."""

    reason: str
    count: int
    examples: list[str]


class ShardRecord(msgspec.Struct, frozen=True):
    """The outcome of one shard."""

    input: FileRecord
    identity: str  # hash of what decides its rows: settings, content and name
    read: int  # samples listed, usable or not
    rows: int
    laid_on_white: int  # images with transparent pixels, which were shown on white
    skipped: list[Skipped]
    files: dict[str, FileRecord]
    from_16_bit: int = 0  # images of 16 bits of grey, which were scaled
    keys: str = "sample"  # or ``shard``, where keys begin with the shard's name


def read_manifest(folder: Path, fix: str) -> list[ShardRecord]:
    """Read the manifest of a folder."""
    rows = read_rows(folder / MANIFEST, fix)
    with reading(folder / MANIFEST, "a manifest of embeddings", fix):
        for row in rows:
            row["files"] = {part: file for part, file in row["files"].items() if file is not None}
        return msgspec.convert(rows, list[ShardRecord])


def merge_skips(records: Iterable[ShardRecord]) -> Skips:
    """Count the samples of all shards that could not be used."""
    skips = Skips()
    for record in records:
        for skipped in record.skipped:
            skips.merge(Skips({skipped.reason: skipped.count}, {skipped.reason: skipped.examples}))
    return skips


def all_files(records: Iterable[ShardRecord]) -> list[FileRecord]:
    """Return the files of all shards."""
    return [file for record in records for file in record.files.values()]


def open_recorded(folder: Path, memo: Memo, fix: str) -> tuple[list[ShardRecord], list[dict[Kind, ArrayFile]]]:
    """Read the manifest of a folder, and find the rows of each shard by kind; refuse files other than were written."""
    records = read_manifest(folder, fix)
    # Looked at before they are compared: what is replaced in between is refused where it is mapped.
    stamps = _look_at_files(folder, records, fix)
    validate_replaceable(folder, records, memo, fix)
    memo.save()
    with reading(folder / MANIFEST, "a manifest of embeddings", fix):
        return records, _describe_rows(folder, records, stamps)


def validate_replaceable(folder: Path, records: Iterable[ShardRecord], memo: Memo, fix: str) -> None:
    """Refuse files that were replaced or removed since the manifest was written."""
    validate_unchanged(folder, all_files(records), folder / MANIFEST, fix, memo)


def _look_at_files(folder: Path, records: Sequence[ShardRecord], fix: str) -> dict[str, Stamp]:
    """Return inode and time of every file of a folder, by its path in it; refuse those that the manifest does not record."""
    recorded = {file.path for file in all_files(records)}
    stamps: dict[str, Stamp] = {}
    for part in (*Kind, METADATA):
        with suppress(OSError), os.scandir(folder / part) as files:
            for file in files:
                name = f"{part}/{file.name}"
                if name not in recorded and not file.name.startswith("."):
                    raise ClipcidError(f"{folder / name} was added since {folder / MANIFEST} was written.", fix)
                with suppress(OSError):  # a link that leads nowhere
                    stat = file.stat()
                    stamps[name] = (stat.st_ino, stat.st_mtime_ns)
    return stamps


def _describe_rows(
    folder: Path, records: Sequence[ShardRecord], stamps: Mapping[str, Stamp]
) -> list[dict[Kind, ArrayFile]]:
    """Describe the rows of each shard by kind: of one the files are looked into, of the others sizes tell the shapes."""
    # `embed` keeps no folder without a row.
    whole = next((record for record in records if record.rows), records[0])
    # Of a sample: (D,), or (V, D) where it has several rows.
    shapes = {kind: find_npy(folder / whole.files[kind].path).shape[1:] for kind in Kind if kind in whole.files}
    shapes.setdefault(Kind.FURTHER, shapes.get(Kind.IMAGES) or shapes[Kind.TEXTS])
    shards: list[dict[Kind, ArrayFile]] = []
    for record in records:
        rows: dict[Kind, ArrayFile] = {}
        for kind, shape in shapes.items():
            file = record.files.get(kind)
            if file is None:
                continue
            values = (file.size - _HEADER) // kind.dtype.itemsize
            count = values // shape[-1] if kind is Kind.FURTHER else record.rows
            if count * math.prod(shape) != values:
                raise ValueError(f"{file.path} of {file.size:,} bytes does not hold {count:,} rows of {list(shape)}")
            rows[kind] = ArrayFile(
                folder / file.path,
                (count, *shape),
                kind.dtype,
                _HEADER,
                stamps.get(file.path, (0, 0)),
                size=file.size,
                hash=file.hash,
            )
        if Kind.IMAGES in rows and METADATA not in record.files:
            raise ValueError(f"{record.input.shard} has no metadata")
        shards.append(rows)
    return shards


@dataclasses.dataclass
class ShardRows:
    """What was made of a shard: n rows of each kind."""

    read: int  # samples listed, usable or not
    skipped: Skips
    adapted: Mapping[str, int]  # how many images were not shown as they are stored: `laid_on_white`, `from_16_bit`
    keys: Sequence[str]
    captions: Sequence[str]  # the first of each sample, empty where there is none
    counts: Sequence[int] | None  # numbers of captions; None where no sample has several
    rows: dict[Kind, npt.NDArray[Any]]


class EmbeddingWriter:
    """Writer of the shards of one folder, each followed by its record."""

    def __init__(
        self, folder: Path, settings: dict[str, Any], inputs: Sequence[FileRecord], keys: str = "sample"
    ) -> None:
        """Prepare to write shards, whose rows these settings decide; `keys` are as of `ShardRecord`."""
        self.folder = folder
        self._keys = keys
        self._inputs = inputs
        self._identities = [identity_of(settings, [shard]) for shard in inputs]
        self._digits = max(4, len(str(len(inputs) - 1)))

    def write(self, index: int, shard: ShardRows) -> None:
        """Write a shard, with its metadata where it has images; the first has number 0."""
        # The record of another run must never accompany rows of this one, even if it is killed in between.
        self._record_path(index).unlink(missing_ok=True)
        write_skipped(self._skipped_path(index), [make_table(shard.skipped.listed)])
        for kind in Kind:
            if kind in shard.rows:
                write_npy(self._path(kind, index), shard.rows[kind])
            else:
                self._path(kind, index).unlink(missing_ok=True)
        given = self._inputs[index]
        parts: list[str] = [*shard.rows]
        if Kind.IMAGES in shard.rows:
            write_parquet(self._path(METADATA, index), _make_metadata(str(given.shard), shard))
            parts.append(METADATA)
        skipped = [
            Skipped(reason, count, [_printable(name) for name in shard.skipped.examples.get(reason, [])])
            for reason, count in sorted(shard.skipped.counts.items())
        ]
        record = ShardRecord(
            input=msgspec.structs.replace(given, path=_printable(given.path)),
            identity=self._identities[index],
            read=shard.read,
            rows=len(shard.keys),
            **shard.adapted,
            skipped=skipped,
            files={part: fingerprint.record(self._path(part, index), self.folder) for part in parts},
            keys=self._keys,
        )
        self._write_record(index, record)

    def read_record(self, index: int) -> ShardRecord | None:
        """Read the outcome of a shard; None when it is unfinished, was changed or damaged, or is of another plan."""
        record = self._find_record(index)
        return record if record is not None and record.keys == self._keys else None

    def _find_record(self, index: int) -> ShardRecord | None:
        path = self._record_path(index)
        record = _read_record(path)
        if record is None or record.identity != self._identities[index]:
            return None
        if record.skipped and not self._skipped_path(index).exists():
            return None
        return record if find_changed(self.folder, record.files.values(), path) is None else None

    def take(self, folder: Path, records: Sequence[ShardRecord]) -> None:
        """Take over the shards of a finished folder, whatever their numbers there, whose files are those it records."""
        there = {record.identity: record for record in records}
        indexes = {str(given.shard): index for index, given in enumerate(self._inputs)}
        for shard, listed in read_shards(folder / SKIPPED):
            index = indexes.get(shard, -1)
            if index >= 0 and self._identities[index] in there and not self._record_path(index).exists():
                write_skipped(self._skipped_path(index), [listed])
        for index, identity in enumerate(self._identities):
            earlier = there.get(identity)
            if earlier is None or self._record_path(index).exists():
                continue
            if earlier.skipped and not self._skipped_path(index).exists():  # it does not say which
                continue
            if find_changed(folder, earlier.files.values(), folder / MANIFEST) is not None:
                continue
            files: dict[str, FileRecord] = {}
            for part, file in earlier.files.items():
                _link(folder / file.path, self._path(part, index))
                files[part] = msgspec.structs.replace(file, path=self._name(part, index))
            self._write_record(index, msgspec.structs.replace(earlier, files=files))

    def rename_keys(self) -> None:
        """Give shards that are finished with keys of the other kind those of this plan; their rows stay.

        Where it is killed on the way, the shard is written again, since its record is of other metadata.
        """
        for index in range(len(self._inputs)):
            record = self._find_record(index)
            if record is None or record.keys == self._keys:
                continue
            prefix = f"{record.input.shard}/"
            files = dict(record.files)
            if METADATA in files:
                path = self._path(METADATA, index)
                with reading(path, "metadata of embeddings", "Embed again.") as file:
                    metadata = pq.read_table(file)
                write_parquet(path, self._rename(metadata, prefix))
                files[METADATA] = fingerprint.record(path, self.folder)
            if record.skipped:
                path = self._skipped_path(index)
                write_skipped(path, [self._rename(pa.concat_tables(read_skipped(path)), prefix)])
            self._write_record(index, msgspec.structs.replace(record, files=files, keys=self._keys))

    def _rename(self, table: pa.Table, prefix: str) -> pa.Table:
        keys = table["key"]
        if self._keys == "shard":
            renamed = pc.binary_join_element_wise(prefix, keys, "")
        else:
            renamed = pc.utf8_slice_codeunits(keys, len(prefix))
        return table.set_column(table.column_names.index("key"), "key", renamed)

    def finish(self) -> list[ShardRecord]:
        """Write the manifest and the list of skipped samples once all shards are finished; return the manifest."""
        records = [self.read_record(index) for index in range(len(self._inputs))]
        finished = [record for record in records if record is not None]
        assert len(finished) == len(records), "every shard was written by one of the processes"
        skipped = (self._skipped_path(index) for index, record in enumerate(finished) if record.skipped)
        write_skipped(self.folder / SKIPPED, (table for path in skipped for table in read_skipped(path)))
        parts = [part for part in (*Kind, METADATA) if any(part in record.files for record in finished)]
        schema = pa.schema(
            {
                "input": _INPUT,
                "identity": _TEXT,
                **dict.fromkeys(("read", "rows", "laid_on_white", "from_16_bit"), _NUMBER),
                "keys": _TEXT,
                "skipped": _SKIPPED,
                "files": pa.struct([(part, _FILE) for part in parts]),
            }
        )
        write_parquet(self.folder / MANIFEST, pa.Table.from_pylist(msgspec.to_builtins(finished), schema))
        return finished

    def _write_record(self, index: int, record: ShardRecord) -> None:
        write_json(self._record_path(index), msgspec.to_builtins(record))

    def _skipped_path(self, index: int) -> Path:
        return self._record_path(index).with_suffix(f".{SKIPPED}")

    def _record_path(self, index: int) -> Path:
        return self.folder / _RECORDS / f"{index:0{self._digits}d}.json"

    def _path(self, part: str, index: int) -> Path:
        return self.folder / self._name(part, index)

    def _name(self, part: str, index: int) -> str:
        form = "parquet" if part == METADATA else "npy"
        return f"{part}/{part}_{index:0{self._digits}d}.{form}"


def _make_metadata(shard: str, rows: ShardRows) -> pa.Table:
    try:
        columns = {
            "key": pa.array(rows.keys, pa.string()),
            "shard": pa.array([shard] * len(rows.keys), pa.string()),
            "caption": pa.array(rows.captions, pa.string()),
        }
    except UnicodeEncodeError as error:
        raise ClipcidError(
            f"Shard {shard}: the name of a file is not UTF-8: {ascii(error.object)[1:-1]}.",
            "Rename the file; keys and names of shards are text.",
        ) from error
    if rows.counts is not None:
        columns[COUNTS_COLUMN] = pa.array(rows.counts, pa.int32())
    return pa.table(columns)


def read_unfinished(folder: Path, step: str) -> list[FileRecord]:
    """Return the shards that an unfinished run of a folder has embedded, in order, whatever its settings are."""
    records = (path for work in find_works(folder, step) for path in work.glob(FINISHED))
    paths = sorted(records, key=lambda path: natural_key(path.name))
    return [record.input for path in paths if (record := _read_record(path)) is not None]


def _read_record(path: Path) -> ShardRecord | None:
    with suppress(OSError, msgspec.DecodeError):  # missing, or damaged
        return msgspec.json.decode(read_regular(path, LARGEST_TEXT), type=ShardRecord)
    return None


def _printable(name: str) -> str:
    """Return a name without letters that stand for bytes that are not UTF-8, as those of files may have."""
    return name.encode("utf-8", "backslashreplace").decode()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it with its time where the file system has no links."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
    except OSError as error:
        raise write_error(target, error) from error
