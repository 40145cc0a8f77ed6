"""The rows of a folder of embeddings by its manifest, once its files are known to be those that were written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import METADATA, Kind
from clipcid_cli.formats.embeddings.manifest import MANIFEST, ShardRecord, all_files, read_manifest
from clipcid_cli.formats.embeddings.rows import ArrayFile, find_npy
from clipcid_cli.formats.files import reading
from clipcid_cli.formats.fingerprint import validate_unchanged
from clipcid_cli.formats.memo import Memo

# Bytes that numpy writes before the values of an array of few dimensions.
_HEADER = 128

Stamp = tuple[int, int]  # inode, time of modification in ns


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
