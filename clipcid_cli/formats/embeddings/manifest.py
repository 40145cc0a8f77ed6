"""``manifest.parquet``: what `embed` made of each shard, a row a shard, in the order of the rows."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_parquet
from clipcid_cli.formats.embeddings.kinds import METADATA, Kind
from clipcid_cli.formats.embeddings.row_files import RowFile
from clipcid_cli.formats.fingerprint import FileRecord, Memo, refuse_changed
from clipcid_cli.formats.parquet import read_rows
from clipcid_cli.formats.reading import reading
from clipcid_cli.formats.skips import Skips

MANIFEST = "manifest.parquet"
# Bytes that numpy writes before the values of an array of few dimensions.
_HEADER = 128

_TEXT, _NUMBER = pa.string(), pa.int64()
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
    """The outcome of one shard.

    Attributes:
        identity: Hash of what decides its rows: settings, content and name.
        read: Samples listed, usable or not.
        laid_on_white: Images with transparent pixels, which were shown on white.
    """

    input: FileRecord
    identity: str
    read: int
    rows: int
    laid_on_white: int
    skipped: list[Skipped]
    files: dict[str, FileRecord]


def write_manifest(folder: Path, records: Sequence[ShardRecord]) -> None:
    """Write the manifest of a folder."""
    parts = [part for part in (*Kind, METADATA) if any(part in each.files for each in records)]
    schema = pa.schema(
        {
            "input": _INPUT,
            "identity": _TEXT,
            **dict.fromkeys(("read", "rows", "laid_on_white"), _NUMBER),
            "skipped": _SKIPPED,
            "files": pa.struct([(part, _FILE) for part in parts]),
        }
    )
    write_parquet(folder / MANIFEST, pa.Table.from_pylist(msgspec.to_builtins(records), schema))


def read_manifest(folder: Path, fix: str) -> list[ShardRecord]:
    """Read the manifest of a folder."""
    rows = read_rows(folder / MANIFEST, fix)
    with reading(folder / MANIFEST, "a manifest of embeddings", fix):
        for row in rows:
            row["files"] = {part: found for part, found in row["files"].items() if found is not None}
        return msgspec.convert(rows, list[ShardRecord])


def merge_skips(records: Iterable[ShardRecord]) -> Skips:
    """Count the samples of all shards that could not be used."""
    found = Skips()
    for record in records:
        for each in record.skipped:
            found.merge(Skips({each.reason: each.count}, {each.reason: each.examples}))
    return found


def all_files(records: Iterable[ShardRecord]) -> list[FileRecord]:
    """Return the files of all shards."""
    return [file for record in records for file in record.files.values()]


def open_recorded(folder: Path, memo: Memo, fix: str) -> tuple[list[ShardRecord], list[dict[Kind, RowFile]]]:
    """Read the manifest of a folder, and find the rows of each shard by kind; refuse files other than were written."""
    records = read_manifest(folder, fix)
    # Looked at before they are compared: what is replaced in between is refused where it is mapped.
    stamps = _look_at_files(folder, records, fix)
    with reading(folder / MANIFEST, "a manifest of embeddings", fix):
        rows = _describe_rows(folder, records, stamps)
    refuse_replaced(folder, records, memo, fix)
    memo.save()
    return records, rows


def refuse_replaced(folder: Path, records: Iterable[ShardRecord], memo: Memo, fix: str) -> None:
    """Refuse files that were replaced or removed since the manifest was written."""
    refuse_changed(folder, all_files(records), folder / MANIFEST, fix, memo)


def _look_at_files(folder: Path, records: Sequence[ShardRecord], fix: str) -> dict[str, Stamp]:
    """Return inode and time of every file of a folder, by its path in it; refuse those that the manifest does not record."""
    recorded = {file.path for file in all_files(records)}
    found: dict[str, Stamp] = {}
    for part in (*Kind, METADATA):
        with suppress(OSError), os.scandir(folder / part) as files:
            for file in files:
                name = f"{part}/{file.name}"
                if name not in recorded and not file.name.startswith("."):
                    raise ClipcidError(f"{folder / name} was added since {folder / MANIFEST} was written.", fix)
                with suppress(OSError):  # a link that leads nowhere
                    stat = file.stat()
                    found[name] = (stat.st_ino, stat.st_mtime_ns)
    return found


def _describe_rows(
    folder: Path, records: Sequence[ShardRecord], stamps: Mapping[str, Stamp]
) -> list[dict[Kind, RowFile]]:
    """Describe the rows of each shard by kind: shapes follow from the sizes of the files, none of which is opened.

    Raises:
        LookupError, ValueError, ZeroDivisionError: when records do not fit together.
    """
    shapes = _shapes_of_a_sample(records)
    found: list[dict[Kind, RowFile]] = []
    for record in records:
        rows: dict[Kind, RowFile] = {}
        for kind in (each for each in shapes if each in record.files):
            file = record.files[kind]
            shape = shapes[kind]
            values = _count_values(kind, file)
            number = values // shape[-1] if kind is Kind.FURTHER else record.rows
            if number * math.prod(shape) != values:
                raise ValueError(f"{file.path} of {file.size:,} bytes does not hold {number:,} rows of {list(shape)}")
            stamp = stamps.get(file.path, (0, 0))
            place = folder / file.path
            rows[kind] = RowFile(place, (number, *shape), kind.dtype, _HEADER, stamp, size=file.size, hash=file.hash)
        if Kind.IMAGES in rows and METADATA not in record.files:
            raise ValueError(f"{record.input.shard} has no metadata")
        found.append(rows)
    return found


def _shapes_of_a_sample(records: Sequence[ShardRecord]) -> dict[Kind, tuple[int, ...]]:
    """Return the shape of a sample's rows by kind, which all shards have in common: (D,), or (V, D)."""
    # `embed` keeps no folder without a row.
    whole = next((record for record in records if record.rows), records[0])
    values = {kind: _count_values(kind, whole.files[kind]) // whole.rows for kind in Kind if kind in whole.files}
    width = values.get(Kind.IMAGES) or values[Kind.TEXTS]
    shapes: dict[Kind, tuple[int, ...]] = dict.fromkeys((Kind.IMAGES, Kind.TEXTS, Kind.FURTHER), (width,))
    for kind in (Kind.VIEWS, Kind.VARIANTS):
        if kind in values:
            shapes[kind] = (values[kind] // width, width)
    if Kind.VIEW_PARAMS in values:
        views = shapes[Kind.VIEWS][0]
        shapes[Kind.VIEW_PARAMS] = (views, values[Kind.VIEW_PARAMS] // views)
    return shapes


def _count_values(kind: Kind, file: FileRecord) -> int:
    return (file.size - _HEADER) // kind.dtype.itemsize


def record_together(path: str, contents: Iterable[FileRecord]) -> FileRecord:
    """Describe several files, in order, as one input: their size in all, and one hash over sizes and hashes."""
    size = 0
    digest = hashlib.blake2b(digest_size=16)
    for each in contents:
        size += each.size
        digest.update(f"{each.size} {each.hash}\n".encode())
    return FileRecord(path, size, f"blake2b:{digest.hexdigest()}")


def find_lost(there: Sequence[FileRecord], now: Collection[FileRecord]) -> str:
    """Tell which of some files are no longer among those of now as they were; empty where all are, in the same order."""
    rest = iter([each.content for each in now])
    if all(each.content in rest for each in there):
        return ""
    contents = {each.content for each in now}
    names = {each.content[:2]: each.shard for each in now}
    changed = [each for each in there if each.content not in contents]
    renamed = [each for each in changed if each.content[:2] in names]
    gone = [Path(each.path).name for each in changed if each.content[:2] not in names]
    told = f"{len(there)} files there, {len(now)} now"
    if renamed:
        first = renamed[0]
        told += f"; {len(renamed)} shards have another name, such as {first.shard}, now {names[first.content[:2]]}"
    if gone:
        told += f"; changed or gone: {', '.join(gone[:3])}" + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
    return told
