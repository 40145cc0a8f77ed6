"""Fingerprints: one rule by which a file is still the one it was, and a memo of the hashes that were taken.

The same size and time of modification are enough; of another time, as in a copy, the hash decides. The hash of a file is
taken once: it is remembered with size and time in one table for all files of a work directory. Only speed depends on the
table: it may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file, remove_abandoned
from clipcid_cli.formats.reading import open_regular

if TYPE_CHECKING:
    import pyarrow as pa

# Files up to this size are hashed whole, larger ones at the head, the middle and the tail: a petabyte would take too long.
_WHOLE_FILE = 64 * 2**20
_WINDOW = 2**20
# Of more files than this sizes and times are read from a listing of their folders: a look at each of 41,000 takes seconds.
_FEW_FILES = 64
_THREADS = 16  # hashing waits for the disk
_COLUMNS = ("path", "size", "time", "hash")


class FileRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is recorded of a file, or of anything else that is known by a size and a hash.

    Attributes:
        path: For people; of an output relative to its folder.
        size: Bytes, or another number that belongs to the content.
        hash: ``blake2b:…``; of a file above 64 MiB ``blake2b-sampled:…``, of its size and three windows of 1 MiB.
        time: Of modification, in ns; 0 for what is no local file.
        shard: Name of the shard that it is, where an output repeats it.
    """

    path: str
    size: int
    hash: str
    time: int = 0
    shard: str | None = None

    @property
    def content(self) -> tuple[int, str, str | None]:
        """What an input is compared by. Not its path: moved, or reached by another path, it is the same input."""
        return self.size, self.hash, self.shard


def record(path: Path, folder: Path | None = None) -> FileRecord:
    """Hash a file.

    Args:
        folder: What its path is recorded relative to; None: as it is.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open_regular(path) as file:
        stat = os.fstat(file.fileno())
        if stat.st_size <= _WHOLE_FILE:
            digest.update(file.read())
            kind = "blake2b"
        else:
            digest.update(str(stat.st_size).encode())
            for start in (0, (stat.st_size - _WINDOW) // 2, stat.st_size - _WINDOW):
                file.seek(start)
                digest.update(file.read(_WINDOW))
            kind = "blake2b-sampled"
    return FileRecord(_name(path, folder), stat.st_size, f"{kind}:{digest.hexdigest()}", stat.st_mtime_ns)


def _name(path: Path, folder: Path | None) -> str:
    return str(path) if folder is None else os.path.relpath(path, folder)


def identity_of(settings: dict[str, Any], inputs: Iterable[FileRecord]) -> str:
    """Hash settings and the content of inputs, independent of their paths: 16 hexadecimal digits."""
    content = [settings, [[part for part in each.content if part is not None] for each in inputs]]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def to_table(records: Sequence[FileRecord]) -> pa.Table:
    """Return records as columns ``path``, ``size``, ``time`` and ``hash``."""
    import pyarrow as pa

    return pa.table([[getattr(each, name) for each in records] for name in _COLUMNS], schema=_schema())


def from_table(table: pa.Table) -> list[FileRecord]:
    """Return the records of a table that `to_table` made."""
    columns = (table[name].to_pylist() for name in _COLUMNS)
    return [FileRecord(path, size, digest, time) for path, size, time, digest in zip(*columns, strict=True)]


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("path", pa.string()), ("size", pa.int64()), ("time", pa.int64()), ("hash", pa.string())])


class Memo:
    """The records of files by path; may be used from any thread."""

    def __init__(self, table: Path | None = None) -> None:
        """Read the table, which need not exist; None remembers nothing beyond this object."""
        self._table = table
        self._known: dict[str, FileRecord] = {}
        self._is_new = False
        if table is not None:
            import pyarrow as pa
            import pyarrow.parquet as pq

            with suppress(OSError, pa.ArrowException):  # missing, or damaged
                self._known = {each.path: each for each in from_table(pq.read_table(table, schema=_schema()))}

    def record(self, path: Path, folder: Path | None = None) -> FileRecord:
        """Return what `record` returns; a file of the same size and time is not read again."""
        place = os.path.abspath(path)
        stat, known = path.stat(), self._known.get(place)
        if known is None or (known.size, known.time) != (stat.st_size, stat.st_mtime_ns):
            known = self._known[place] = msgspec.structs.replace(record(path), path=place)
            self._is_new = True
        return msgspec.structs.replace(known, path=_name(path, folder))

    def record_all(self, paths: Iterable[Path], folder: Path | None = None) -> list[FileRecord]:
        """Return the records of many files, in order."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(lambda path: self.record(path, folder), paths))

    def save(self) -> None:
        """Write the table where something was added to it, and it can be written."""
        if self._table is None or not self._is_new:
            return
        import pyarrow.parquet as pq

        records = [self._known[path] for path in sorted(self._known) if _is_text(path)]
        remove_abandoned(self._table.parent.glob(f".{self._table.name}.*.partial"))
        with (
            suppress(ClipcidError, OSError),
            atomic_file(self._table, shared=True) as file,
        ):  # two runs may save at once
            pq.write_table(to_table(records), file)
        self._is_new = False


def _is_text(path: str) -> bool:
    """Tell whether a path is valid UTF-8, as the table's are."""
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


def find_changed(folder: Path, records: Collection[FileRecord], since: Path, memo: Memo | None = None) -> str | None:
    """Find recorded files that were removed, replaced or edited since.

    Args:
        folder: What their paths are relative to.
        since: The file that records them, for the answer.
        memo: Where their hashes are remembered.

    Returns:
        What is wrong with the first of them, a sentence; None where none changed.
    """
    stats, memo = _look_at(folder, records), memo or Memo()
    suspects = [each for each in records if stats.get(each.path) != (each.size, each.time)]

    def is_same(suspect: FileRecord) -> bool:
        size, _ = stats.get(suspect.path, (-1, 0))
        try:
            return size == suspect.size and memo.record(folder / suspect.path).hash == suspect.hash
        except OSError:
            return False

    with ThreadPoolExecutor(_THREADS) as pool:
        changed = next(
            (each for each, same in zip(suspects, pool.map(is_same, suspects), strict=True) if not same), None
        )
    if changed is None:
        return None
    path = folder / changed.path
    if not path.is_file():
        return f"{path} is missing, which {since} says was written."
    now = record(path)
    return (
        f"{path} has changed since {since} was written: {changed.size:,} bytes ({changed.hash}) then, {now.size:,} bytes "
        f"({now.hash}) now."
    )


def refuse_changed(
    folder: Path, records: Collection[FileRecord], since: Path, fix: Callable[[], str], memo: Memo | None = None
) -> None:
    """Raise what `find_changed` finds.

    Args:
        fix: Says what to run to make the files again; called where one has changed.
    """
    changed = find_changed(folder, records, since, memo)
    if changed is not None:
        raise ClipcidError(changed, fix())


def _look_at(folder: Path, records: Collection[FileRecord]) -> dict[str, tuple[int, int]]:
    """Return size and time, by the recorded path, of the files that are there."""
    found: dict[str, tuple[int, int]] = {}
    if len(records) <= _FEW_FILES:
        for each in records:
            with suppress(OSError):
                stat = os.stat(folder / each.path)
                found[each.path] = (stat.st_size, stat.st_mtime_ns)
        return found
    for parent in {os.path.dirname(each.path) for each in records}:
        with suppress(OSError), os.scandir(folder / parent) as entries:
            for entry in entries:
                with suppress(OSError):  # a link that leads nowhere
                    stat = entry.stat()
                    found[os.path.join(parent, entry.name)] = (stat.st_size, stat.st_mtime_ns)
    return found
