"""Writing a folder of embeddings shard by shard; several processes may write different shards of it at once."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import fingerprint
from clipcid_cli.formats.atomic import write_error, write_json, write_npy, write_parquet
from clipcid_cli.formats.data.samples import natural_key
from clipcid_cli.formats.embeddings.kinds import COUNTS_COLUMN, METADATA, Kind, count_digits, file_name
from clipcid_cli.formats.embeddings.manifest import MANIFEST, ShardRecord, Skipped, write_manifest
from clipcid_cli.formats.fingerprint import FileRecord, find_changed, identity_of
from clipcid_cli.formats.skips import Skips

# Records of finished shards, until all are finished.
_RECORDS = ".shards"


@dataclasses.dataclass
class ShardRows:
    """What was made of a shard: n rows of each kind.

    Attributes:
        read: Samples listed, usable or not.
        laid_on_white: Images with transparent pixels, which were shown on white.
        captions: The first of each sample, empty where there is none.
        counts: Numbers of captions; None where no sample has several.
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

    def __init__(self, folder: Path, settings: dict[str, Any], inputs: Sequence[FileRecord]) -> None:
        """Prepare to write shards, whose rows these settings decide."""
        self.folder = folder
        self._inputs = inputs
        self._identities = [identity_of(settings, [each]) for each in inputs]
        self._digits = count_digits(len(inputs))

    def write(self, number: int, made: ShardRows) -> None:
        """Write a shard, with its metadata where it has images; the first has number 0."""
        # The record of another run must never accompany rows of this one, even if it is killed in between.
        self._record_path(number).unlink(missing_ok=True)
        for kind in Kind:
            if kind in made.rows:
                write_npy(self._path(kind, number), made.rows[kind])
            else:
                self._path(kind, number).unlink(missing_ok=True)
        given = self._inputs[number]
        parts: list[str] = [*made.rows]
        if Kind.IMAGES in made.rows:
            write_parquet(self._path(METADATA, number), _make_metadata(str(given.shard), made))
            parts.append(METADATA)
        skipped = [
            Skipped(reason, count, [_printable(name) for name in made.skipped.examples.get(reason, [])])
            for reason, count in sorted(made.skipped.counts.items())
        ]
        record = ShardRecord(
            input=msgspec.structs.replace(given, path=_printable(given.path)),
            identity=self._identities[number],
            read=made.read,
            rows=len(made.keys),
            laid_on_white=made.laid_on_white,
            skipped=skipped,
            files={part: fingerprint.record(self._path(part, number), self.folder) for part in parts},
        )
        self._write_record(number, record)

    def read_record(self, number: int) -> ShardRecord | None:
        """Read the outcome of a shard; None when it is unfinished, was changed or damaged, or is of another plan."""
        path = self._record_path(number)
        record = _read_record(path)
        if record is None or record.identity != self._identities[number]:
            return None
        return record if find_changed(self.folder, record.files.values(), path) is None else None

    def take(self, folder: Path, records: Sequence[ShardRecord]) -> None:
        """Take over the shards of a finished folder, whatever their numbers there, whose files are those it records."""
        there = {record.identity: record for record in records}
        for number, identity in enumerate(self._identities):
            earlier = there.get(identity)
            if earlier is None or self._record_path(number).exists():
                continue
            if find_changed(folder, earlier.files.values(), folder / MANIFEST) is not None:
                continue
            for part, file in earlier.files.items():
                _link(folder / file.path, self._path(part, number))
            paths = {part: file_name(part, number, self._digits) for part in earlier.files}
            files = {part: msgspec.structs.replace(file, path=paths[part]) for part, file in earlier.files.items()}
            self._write_record(number, msgspec.structs.replace(earlier, files=files))

    def finish(self) -> list[ShardRecord]:
        """Write the manifest once all shards are finished, and return it."""
        records = [self.read_record(number) for number in range(len(self._inputs))]
        finished = [record for record in records if record is not None]
        assert len(finished) == len(records), "every shard was written by one of the processes"
        write_manifest(self.folder, finished)
        return finished

    def _write_record(self, number: int, record: ShardRecord) -> None:
        write_json(self._record_path(number), msgspec.to_builtins(record))

    def _record_path(self, number: int) -> Path:
        return self.folder / _RECORDS / f"{number:0{self._digits}d}.json"

    def _path(self, part: str, number: int) -> Path:
        return self.folder / file_name(part, number, self._digits)


def _make_metadata(shard: str, made: ShardRows) -> pa.Table:
    try:
        columns = {
            "key": pa.array(made.keys, pa.string()),
            "shard": pa.array([shard] * len(made.keys), pa.string()),
            "caption": pa.array(made.captions, pa.string()),
        }
    except UnicodeEncodeError as error:
        raise ClipcidError(
            f"Shard {shard}: the name of a file is not UTF-8: {ascii(error.object)[1:-1]}.",
            "Rename the file; keys and names of shards are text.",
        ) from error
    if made.counts is not None:
        columns[COUNTS_COLUMN] = pa.array(made.counts, pa.int32())
    return pa.table(columns)


def read_unfinished(folder: Path, step: str) -> list[FileRecord]:
    """Return the shards that an unfinished run of a folder has embedded, in order, whatever its settings are."""
    paths = sorted(folder.glob(f".{step}-*/{_RECORDS}/*.json"), key=lambda path: natural_key(path.name))
    return [record.input for path in paths if (record := _read_record(path)) is not None]


def _read_record(path: Path) -> ShardRecord | None:
    with suppress(OSError, msgspec.DecodeError):  # missing, or damaged
        return msgspec.json.decode(path.read_bytes(), type=ShardRecord)
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
