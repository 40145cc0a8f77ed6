"""Fingerprints: one rule by which a file is still the one it was, and a memo of the hashes that were taken.

The same size and time of modification are enough; of another time, as in a copy, the hash decides. A hash is taken once and
remembered with size and time in one table of the work directory, on which only speed depends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import open_regular, read_regular, write_text

# Files up to this size are hashed whole, larger ones at the head, the middle and the tail: a petabyte would take too long.
_WHOLE_FILE = 64 * 2**20
_WINDOW = 2**20
_THREADS = 16  # hashing waits for the disk


class FileRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is recorded of a file, or of anything else that is known by a size and a hash."""

    path: str  # for people; of an output relative to its folder
    size: int  # bytes, or another number that belongs to the content
    hash: str  # ``blake2b:…``; of a file above 64 MiB ``blake2b-sampled:…``, of its size and three windows of 1 MiB
    time: int = 0  # of modification, in ns; 0 for what is no local file
    shard: str | None = None  # name of the shard that it is, where an output repeats it

    @property
    def content(self) -> tuple[int, str, str | None]:
        """What an input is compared by. Not its path: moved, or reached by another path, it is the same input."""
        return self.size, self.hash, self.shard


def record(path: Path, folder: Path | None = None) -> FileRecord:
    """Hash a file; its path is recorded relative to `folder`, where that is given."""
    with open_regular(path) as file:
        stat = os.fstat(file.fileno())
        if stat.st_size <= _WHOLE_FILE:
            found = f"blake2b:{hashlib.blake2b(file.read(), digest_size=16).hexdigest()}"
        else:
            found = hash_windows(file, stat.st_size, _WINDOW)
    return FileRecord(_name(path, folder), stat.st_size, found, stat.st_mtime_ns)


def hash_windows(file: IO[bytes], size: int, window: int) -> str:
    """Hash the size of a file and so many of its bytes at the head, in the middle and at the tail."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for start in (0, max(0, (size - window) // 2), max(0, size - window)):
        file.seek(start)
        digest.update(file.read(window))
    return f"blake2b-sampled:{digest.hexdigest()}"


def _name(path: Path, folder: Path | None) -> str:
    return str(path) if folder is None else os.path.relpath(path, folder)


def record_together(path: str, contents: Iterable[FileRecord]) -> FileRecord:
    """Describe several files, in order, as one input: their size in all, and one hash over sizes and hashes."""
    size = 0
    digest = hashlib.blake2b(digest_size=16)
    for each in contents:
        size += each.size
        digest.update(f"{each.size} {each.hash}\n".encode())
    return FileRecord(path, size, f"blake2b:{digest.hexdigest()}")


def identity_of(settings: dict[str, Any], inputs: Iterable[FileRecord]) -> str:
    """Hash settings and the content of inputs, independent of their paths: 16 hexadecimal digits."""
    return hash_json([settings, [[part for part in each.content if part is not None] for each in inputs]])


def hash_json(content: Any) -> str:
    """Hash JSON values: 16 hexadecimal digits, for the names of files that depend on all of them."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


class Memo:
    """The records of files by path; may be used from any thread."""

    def __init__(self, table: Path | None = None) -> None:
        """Read the table, which need not exist; None remembers nothing beyond this object."""
        self.table = table
        self._known: dict[str, FileRecord] = {}
        self._is_new = False
        if table is not None:
            with suppress(Exception):  # missing, or damaged in whatever way
                found = msgspec.convert(json.loads(read_regular(table)), list[FileRecord])
                self._known = {each.path: each for each in found}

    def record(self, path: Path) -> FileRecord:
        """Return what `record` returns; a file of the same size and time is not read again."""
        place = os.path.abspath(path)
        stat = path.stat()
        known = self._known.get(place)
        if known is None or (known.size, known.time) != (stat.st_size, stat.st_mtime_ns):
            known = self._known[place] = msgspec.structs.replace(record(path), path=place)
            self._is_new = True
        return msgspec.structs.replace(known, path=str(path))

    def record_all(self, paths: Iterable[Path]) -> list[FileRecord]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.record, paths))

    def save(self) -> None:
        """Write the table where something was added to it, and it can be written."""
        if self.table is None or not self._is_new:
            return
        known = msgspec.to_builtins(sorted(self._known.values(), key=lambda each: each.path))
        with suppress(ClipcidError):
            write_text(self.table, json.dumps(known), shared=True)  # two runs may save at once
        self._is_new = False


def find_changed(folder: Path, records: Collection[FileRecord], since: Path, memo: Memo | None = None) -> str | None:
    """Find the first of recorded files that was removed, replaced or edited since; return what is wrong, a sentence.

    Their paths are relative to `folder`; `since` is the file that records them.
    """
    memo = memo or Memo()
    stats: dict[str, tuple[int, int]] = {}
    for each in records:
        with suppress(OSError, ValueError):  # missing, or its name is none
            stat = os.stat(os.path.join(folder, each.path))  # half the time of pathlib's, for 150,000 files
            stats[each.path] = (stat.st_size, stat.st_mtime_ns)
    suspects = [each for each in records if stats.get(each.path) != (each.size, each.time)]

    def is_same(suspect: FileRecord) -> bool:
        try:
            size, _ = stats[suspect.path]
            return size == suspect.size and memo.record(folder / suspect.path).hash == suspect.hash
        except (KeyError, OSError):
            return False

    with ThreadPoolExecutor(_THREADS) as pool:
        same = pool.map(is_same, suspects)
        changed = next((each for each, is_it in zip(suspects, same, strict=True) if not is_it), None)
    if changed is None:
        return None
    path = folder / changed.path
    if not path.is_file():
        return f"{path} is missing, although {since} says it was written."
    now = record(path)
    return (
        f"{path} has changed since {since} was written: {changed.size:,} bytes ({changed.hash}) then, {now.size:,} bytes "
        f"({now.hash}) now."
    )


def validate_unchanged(
    folder: Path, records: Collection[FileRecord], since: Path, fix: str, memo: Memo | None = None
) -> None:
    """Raise what `find_changed` finds; `fix` says what makes the files again."""
    changed = find_changed(folder, records, since, memo)
    if changed is not None:
        raise ClipcidError(changed, fix)


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
        told += f"; {len(renamed)} shards were renamed, such as {first.shard}, now {names[first.content[:2]]}"
    if gone:
        told += f"; changed or gone: {', '.join(gone[:3])}" + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
    return told
