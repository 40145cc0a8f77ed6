"""``manifest.parquet``: what `embed` made of each shard, a row a shard, and whether its files are still those.

Until all shards are embedded each has a record of its own, written after its files; those are gathered in the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_parquet
from clipcid_cli.formats.embeddings.arrays import RowFile
from clipcid_cli.formats.embeddings.kinds import METADATA, Kind, count_digits, file_name
from clipcid_cli.formats.parquet import column_names, read_columns
from clipcid_cli.formats.skips import Skips

MANIFEST = "manifest.parquet"
HEADER = 128
"""Bytes that numpy writes before the values of an array of few dimensions."""

_TEXT, _NUMBER = pa.string(), pa.int64()
_SHARD = {
    "shard": _TEXT,
    "identity": _TEXT,
    "input_size": _NUMBER,
    "input_hash": _TEXT,
    "read": _NUMBER,
    "rows": _NUMBER,
    "laid_on_white": _NUMBER,
}
_FILE = {"size": _NUMBER, "time": _NUMBER, "hash": _TEXT}
_SKIPPED = pa.list_(pa.struct({"reason": _TEXT, "count": _NUMBER, "examples": pa.list_(_TEXT)}))

Stamp = tuple[int, int]  # inode, time of modification in ns


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a shard as it was written.

    Attributes:
        size: Bytes.
        time: Of modification, in ns.
        hash: As of `fingerprint_file`.
    """

    size: int
    time: int
    hash: str


@dataclasses.dataclass(frozen=True, slots=True)
class ShardRecord:
    """The outcome of one shard.

    Attributes:
        shard: Its name.
        identity: Hash of what decides its rows: settings, and the content and name of the shard.
        input_size: Bytes of the shard.
        input_hash: Of its content, as the data's index has it.
        read: Samples listed, usable or not.
        laid_on_white: Images with transparent pixels, which were shown on white.
        skipped: Samples that could not be used.
        files: By kind of rows, and of the metadata.
    """

    shard: str
    identity: str
    input_size: int
    input_hash: str
    read: int
    rows: int
    laid_on_white: int
    skipped: Skips
    files: dict[str, FileRecord]


def write_manifest(folder: Path, records: Sequence[ShardRecord]) -> None:
    """Write the manifest of a folder; of a kind that no shard has there are no columns."""
    columns = {name: pa.array([getattr(each, name) for each in records], kind) for name, kind in _SHARD.items()}
    skipped = [
        [
            {"reason": reason, "count": count, "examples": each.skipped.examples.get(reason, [])}
            for reason, count in sorted(each.skipped.counts.items())
        ]
        for each in records
    ]
    columns["skipped"] = pa.array(skipped, _SKIPPED)
    for part in (*Kind, METADATA):
        files = [each.files.get(part) for each in records]
        if any(files):
            for name, kind in _FILE.items():
                missing = None if name == "hash" else 0
                columns[f"{part}.{name}"] = pa.array([getattr(file, name, missing) for file in files], kind)
    write_parquet(folder / MANIFEST, pa.table(columns))


def read_manifest(folder: Path, fix: str) -> list[ShardRecord]:
    """Read the manifest of a folder.

    Args:
        fix: What to do where it cannot be read.
    """
    path = folder / MANIFEST
    there = column_names(path, fix)
    parts = [part for part in (*Kind, METADATA) if f"{part}.size" in there]
    kinds = _SHARD | {"skipped": _SKIPPED} | {f"{part}.{name}": kind for part in parts for name, kind in _FILE.items()}
    table = read_columns(path, kinds, fix)
    found = {name: table[name].to_pylist() for name in kinds}
    shards = zip(*(found[name] for name in _SHARD), strict=True)
    files: list[dict[str, FileRecord]] = [{} for _ in range(table.num_rows)]
    for part in parts:
        for entry, *values in zip(files, *(found[f"{part}.{name}"] for name in _FILE), strict=True):
            if values[-1] is not None:
                entry[part] = FileRecord(*values)
    return [
        ShardRecord(*shard, _read_skips(skipped), entry)
        for shard, skipped, entry in zip(shards, found["skipped"], files, strict=True)
    ]


def _read_skips(entries: list[dict[str, Any]]) -> Skips:
    if not entries:
        return Skips()
    counts = {entry["reason"]: entry["count"] for entry in entries}
    return Skips(counts, {entry["reason"]: entry["examples"] for entry in entries})


class Unchanged:
    """The files of a folder, found to be those of its manifest.

    Attributes:
        records: The manifest.
        stamps: Inode and time of each file, by its path in the folder.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[ShardRecord],
        fingerprint: Callable[[Path], dict[str, Any]],
        fix: Callable[[], str],
    ) -> None:
        """Compare them.

        The same size and time are enough; of another time, as in a copy, the hash decides.

        Args:
            fingerprint: `fingerprint_file`, or one that remembers.
            fix: Says how to make the folder again.

        Raises:
            ClipcidError: naming the first that is missing, has changed or was added.
        """
        self.records = records
        self._folder = folder
        self._fingerprint = fingerprint
        self._fix = fix
        self.stamps: Mapping[str, Stamp] = {}
        self.stamps = self._compare()

    def refuse_changed(self) -> None:
        """Refuse files that were replaced since (ClipcidError)."""
        self._compare()

    def _compare(self) -> dict[str, Stamp]:
        digits, found = count_digits(len(self.records)), dict[str, Stamp]()
        doubtful: list[tuple[Path, FileRecord]] = []
        for part in (*Kind, METADATA):
            there = _list_stats(self._folder / part)
            for number, record in enumerate(self.records):
                wanted, name = record.files.get(part), file_name(part, number, digits)
                if wanted is None:
                    continue
                stat = there.pop(os.path.basename(name), None)
                if stat is None:
                    raise self._missing(self._folder / name)
                found[name] = (stat.st_ino, stat.st_mtime_ns)
                is_known = stat.st_mtime_ns == wanted.time or self.stamps.get(name) == found[name]
                if stat.st_size != wanted.size or not is_known:
                    doubtful.append((self._folder / name, wanted))
            if there:
                added = self._folder / part / min(there)
                raise ClipcidError(f"{added} was added since {self._folder / MANIFEST} was written.", self._fix())
        with ThreadPoolExecutor(16) as pool:  # hashing waits for the disk
            for (path, wanted), now in zip(doubtful, pool.map(self._look, doubtful), strict=True):
                if now is None:
                    raise self._missing(path)
                if (now["size"], now["hash"]) != (wanted.size, wanted.hash):
                    raise ClipcidError(
                        f"{path} has changed since {self._folder / MANIFEST} was written: {wanted.size:,} bytes "
                        f"({wanted.hash}) then, {now['size']:,} bytes ({now['hash']}) now.",
                        self._fix(),
                    )
        return found

    def _look(self, doubtful: tuple[Path, FileRecord]) -> dict[str, Any] | None:
        try:
            return self._fingerprint(doubtful[0])
        except OSError:  # it is no file
            return None

    def _missing(self, path: Path) -> ClipcidError:
        return ClipcidError(f"{path} is missing, which {self._folder / MANIFEST} says was written.", self._fix())


def recorded_rows(
    folder: Path, records: Sequence[ShardRecord], stamps: Mapping[str, Stamp], fix: str
) -> list[dict[Kind, RowFile]]:
    """Describe the rows of each shard by kind: shapes follow from the sizes of the files, none of which is opened.

    Args:
        stamps: Those of `Unchanged`.
        fix: What to do where the sizes are not those of rows.
    """
    digits = count_digits(len(records))
    whole = next((record for record in records if record.rows), None)
    if whole is None:
        raise ClipcidError(
            f"{folder} contains {len(records)} files of embeddings, all without rows.", "Make them again."
        )
    of_sample = {kind: _count(kind, whole.files[kind]) // whole.rows for kind in Kind if kind in whole.files}
    width = of_sample.get(Kind.IMAGES) or of_sample[Kind.TEXTS]
    found: list[dict[Kind, RowFile]] = []
    for number, record in enumerate(records):
        files: dict[Kind, RowFile] = {}
        for kind in Kind:
            file = record.files.get(kind)
            if file is None:
                continue
            name, values = file_name(kind, number, digits), _count(kind, file)
            shape = (record.rows, width)
            if kind is Kind.FURTHER:
                shape = (values // width, width)
            elif kind.has_several:
                each = of_sample[Kind.VIEWS if kind is Kind.VIEW_PARAMS else kind] // width
                shape = (record.rows, each, of_sample[kind] // each)
            if math.prod(shape) != values:
                raise ClipcidError(f"{folder / MANIFEST} does not fit together: {name} of {file.size:,} bytes.", fix)
            files[kind] = RowFile(
                folder / name, shape, kind.dtype, HEADER, stamps[name], size=file.size, hash=file.hash
            )
        found.append(files)
    return found


def _count(kind: Kind, file: FileRecord) -> int:
    """Return how many numbers a file holds."""
    return (file.size - HEADER) // kind.dtype.itemsize


def _list_stats(folder: Path) -> dict[str, os.stat_result]:
    """Look at all files of a folder by one listing, which takes a tenth of the time of a look at each; hidden ones apart."""
    found: dict[str, os.stat_result] = {}
    with suppress(OSError), os.scandir(folder) as files:
        for file in files:
            if not file.name.startswith("."):
                with suppress(OSError):  # a link that leads nowhere
                    found[file.name] = file.stat()
    return found


def fingerprint_together(path: str, contents: Sequence[tuple[int, str]]) -> dict[str, Any]:
    """Describe several files as one input: their size in all, and one hash over sizes and hashes.

    Args:
        path: What they are called together.
        contents: Size and hash of each, in order.
    """
    digest = hashlib.blake2b(digest_size=16)
    for size, content in contents:
        digest.update(f"{size} {content}\n".encode())
    return {"path": path, "size": sum(size for size, _ in contents), "hash": f"blake2b:{digest.hexdigest()}"}
