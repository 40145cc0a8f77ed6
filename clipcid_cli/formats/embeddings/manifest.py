"""``manifest.parquet`` of a folder of embeddings: what `embed` records of each shard, a row a shard, in order."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import METADATA, Kind
from clipcid_cli.formats.embeddings.rows import ArrayFile, find_npy
from clipcid_cli.formats.embeddings.sidecar import read_embed_sidecar
from clipcid_cli.formats.files import (
    reading,
)
from clipcid_cli.formats.fingerprint import FileRecord, find_lost, validate_unchanged
from clipcid_cli.formats.memo import Memo
from clipcid_cli.formats.parquet import read_rows
from clipcid_cli.formats.sidecar import run_again
from clipcid_cli.formats.skips import Skips

if TYPE_CHECKING:
    from clipcid_cli.formats.data.dataset import Dataset

MANIFEST = "manifest.parquet"
# Bytes that numpy writes before the values of an array of few dimensions.
_HEADER = 128

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
    # Until all shards are finished, and not in the manifest: captions that are missing, by key, and those that are used
    # otherwise than as they are stored, by how; and the list of skipped samples.
    without_caption: dict[str, int] = {}
    captions: dict[str, int] = {}
    listed: FileRecord | None = None

    @property
    def is_listed(self) -> bool:
        """Whether the list of its skipped samples is recorded, where it has some."""
        return (self.listed is not None) == bool(self.skipped)


def read_manifest(folder: Path, fix: str) -> list[ShardRecord]:
    """Read the manifest of a folder."""
    rows = read_rows(folder / MANIFEST, fix)
    with reading(folder / MANIFEST, "a manifest of embeddings", fix):
        for row in rows:
            row["files"] = {part: file for part, file in row["files"].items() if file is not None}
        return msgspec.convert(rows, list[ShardRecord])


def validate_embedded(folder: Path, dataset: Dataset) -> None:
    """Refuse the data that embeddings record where a shard has other content now; shards may be added or lacking."""
    sidecar = read_embed_sidecar(folder)
    if sidecar is None or sidecar.data.spec != dataset.spec:  # other data may have shards of the same names
        return
    fix = run_again("embed", sidecar, "Or put the shards back as they were.")
    rows = read_rows(folder / MANIFEST, fix, ["input"])
    with reading(folder / MANIFEST, "a manifest of embeddings", fix):
        inputs = msgspec.convert([row["input"] for row in rows], list[FileRecord])
    names = {shard.name for shard in dataset.shards}
    # Samples of a list or of a folder of images are described as they were read, which other flags change.
    embedded = [file for file in inputs if file.shard in names and not file.is_of_samples]
    if not embedded:
        return
    now = {
        shard.name: msgspec.structs.replace(file, shard=shard.name)
        for shard, file in zip(dataset.shards, dataset.fingerprints(), strict=True)
    }
    lost = find_lost(embedded, [now[str(file.shard)] for file in embedded])
    if lost:
        raise ClipcidError(f"{dataset.spec} has changed since {folder} was made from it: {lost}.", fix)


def merge_skips(records: Iterable[ShardRecord]) -> Skips:
    """Count the samples of all shards that could not be used."""
    skips = Skips()
    for record in records:
        skips.merge(Skips(without=record.without_caption, changed=record.captions))
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
