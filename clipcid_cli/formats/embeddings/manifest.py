"""``manifest.parquet`` of a folder of embeddings: what `embed` records of each shard, a row a shard, in order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.sidecar import read_embed_sidecar
from clipcid_cli.formats.files import (
    reading,
)
from clipcid_cli.formats.fingerprint import FileRecord, find_lost
from clipcid_cli.formats.parquet import read_rows
from clipcid_cli.formats.sidecar import run_again
from clipcid_cli.formats.skips import Skips

if TYPE_CHECKING:
    from clipcid_cli.formats.data.dataset import Dataset

MANIFEST = "manifest.parquet"


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
