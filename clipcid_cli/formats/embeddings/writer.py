"""Writing a folder of embeddings shard by shard; several processes may write different shards of it at once."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_error, write_json, write_npy, write_parquet
from clipcid_cli.formats.embeddings.kinds import COUNTS_COLUMN, METADATA, Kind, count_digits, file_name
from clipcid_cli.formats.embeddings.manifest import FileRecord, ShardRecord, write_manifest
from clipcid_cli.formats.output import fingerprint_file
from clipcid_cli.formats.skips import Skips

# Records of finished shards, until all are finished.
_RECORDS = ".shards"


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """A shard to embed.

    Attributes:
        size: Bytes of its content.
        hash: Of its content.
        identity: Hash of what decides its rows: settings, content and name.
    """

    name: str
    size: int
    hash: str
    identity: str


@dataclasses.dataclass
class ShardRows:
    """What was made of a shard: n rows of each kind.

    Attributes:
        read: Samples listed, usable or not.
        skipped: Samples that could not be used.
        laid_on_white: Images with transparent pixels, which were shown on white.
        keys: Of the n samples.
        captions: Their first captions, empty where there is none.
        counts: Their numbers of captions; None where none has several.
        rows: By kind, see `kinds`.
    """

    read: int
    skipped: Skips
    laid_on_white: int
    keys: Sequence[str]
    captions: Sequence[str]
    counts: Sequence[int] | None
    rows: dict[Kind, npt.NDArray[Any]]


class EmbeddingWriter:
    """Writer of the shards of one folder, each followed by its record, which makes it count as finished."""

    def __init__(self, folder: Path, shards: Sequence[PlannedShard]) -> None:
        """Prepare to write.

        Args:
            folder: Where the files go; of an earlier run of the same shards, or of fewer, it has some already.
        """
        self.folder = folder
        self._shards = shards
        self._digits = count_digits(len(shards))

    def write(self, number: int, made: ShardRows) -> None:
        """Write a shard; the first has number 0."""
        # The record of another run must never accompany rows of this one, even if it is killed in between.
        self._record_path(number).unlink(missing_ok=True)
        for kind in Kind:
            if kind in made.rows:
                write_npy(self._path(kind, number), made.rows[kind])
            else:
                self._path(kind, number).unlink(missing_ok=True)
        shard = self._shards[number]
        try:
            columns = {
                "key": pa.array(made.keys, pa.string()),
                "shard": pa.array([shard.name] * len(made.keys), pa.string()),
                "caption": pa.array(made.captions, pa.string()),
            }
        except UnicodeEncodeError as error:
            raise ClipcidError(
                f"Shard {shard.name}: the name of a file is not UTF-8: {ascii(error.object)[1:-1]}.",
                "Rename the file; keys and names of shards are text.",
            ) from error
        if made.counts is not None:
            columns[COUNTS_COLUMN] = pa.array(made.counts, pa.int32())
        write_parquet(self._path(METADATA, number), pa.table(columns))
        record = ShardRecord(
            shard=shard.name,
            identity=shard.identity,
            input_size=shard.size,
            input_hash=shard.hash,
            read=made.read,
            rows=len(made.keys),
            laid_on_white=made.laid_on_white,
            skipped=made.skipped,
            files={part: _describe(self._path(part, number)) for part in (*made.rows, METADATA)},
        )
        write_json(self._record_path(number), dataclasses.asdict(record))

    def read_record(self, number: int) -> ShardRecord | None:
        """Read the outcome of a shard; None when it is unfinished, was changed or damaged, or is of another plan."""
        try:
            record = msgspec.json.decode(self._record_path(number).read_bytes(), type=ShardRecord)
        except (OSError, msgspec.DecodeError):
            return None
        is_same = record.identity == self._shards[number].identity
        return record if is_same and _has_files(self.folder, record, number, self._digits) else None

    def take(self, folder: Path, records: Sequence[ShardRecord]) -> None:
        """Take the shards over that a finished folder of fewer shards has, whatever their numbers there.

        Args:
            records: The manifest of that folder. Shards whose files are not those that it records are left.
        """
        there = {record.identity: number for number, record in enumerate(records)}
        digits = count_digits(len(records))
        for number, shard in enumerate(self._shards):
            old = there.get(shard.identity)
            if old is None or self._record_path(number).exists() or not _has_files(folder, records[old], old, digits):
                continue
            for part in records[old].files:
                _link(folder / file_name(part, old, digits), self._path(part, number))
            write_json(self._record_path(number), dataclasses.asdict(records[old]))

    def finish(self) -> list[ShardRecord]:
        """Write the manifest once all shards are finished, and return it."""
        records = [self.read_record(number) for number in range(len(self._shards))]
        finished = [record for record in records if record is not None]
        assert len(finished) == len(records), "every shard was written by one of the processes"
        write_manifest(self.folder, finished)
        return finished

    def _record_path(self, number: int) -> Path:
        return self.folder / _RECORDS / f"{number:0{self._digits}d}.json"

    def _path(self, part: str, number: int) -> Path:
        return self.folder / file_name(part, number, self._digits)


def _describe(path: Path) -> FileRecord:
    entry = fingerprint_file(path)
    return FileRecord(entry["size"], path.stat().st_mtime_ns, entry["hash"])


def _has_files(folder: Path, record: ShardRecord, number: int, digits: int) -> bool:
    """Tell whether the files of a shard are those of its record: of the same size and time, or of the same content."""
    try:
        for part, file in record.files.items():
            path = folder / file_name(part, number, digits)
            stat = path.stat()
            if stat.st_size != file.size:
                return False
            if stat.st_mtime_ns != file.time and fingerprint_file(path)["hash"] != file.hash:
                return False
    except OSError:
        return False
    return True


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
