"""Fingerprints: one rule by which a file is still the one it was.

The same size and time of modification are enough; of another time, as in a copy, the hash decides.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import open_regular

if TYPE_CHECKING:
    from clipcid_cli.formats.memo import Memo

# Files up to this size are hashed whole, larger ones at the head, the middle and the tail: a petabyte would take too long.
_WHOLE_FILE = 64 * 2**20
_WINDOW = 2**20
_THREADS = 16  # hashing waits for the disk
# How hashes of samples begin, whose keys, captions and classes depend on how the data is read.
_OF_SAMPLES = ("blake2b-rows:", "blake2b-windows:", "blake2b-shards:")


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

    @property
    def is_of_samples(self) -> bool:
        """Whether it describes samples as they were read, not the bytes of a file."""
        return self.hash.startswith(_OF_SAMPLES)


def record(path: Path, folder: Path | None = None) -> FileRecord:
    """Hash a file; its path is recorded relative to `folder`, where that is given."""
    with open_regular(path) as file:
        stat = os.fstat(file.fileno())
        if stat.st_size <= _WHOLE_FILE:
            digest = f"blake2b:{hashlib.blake2b(file.read(), digest_size=16).hexdigest()}"
        else:
            digest = hash_windows(file, stat.st_size, _WINDOW)
    name = str(path) if folder is None else os.path.relpath(path, folder)
    return FileRecord(name, stat.st_size, digest, stat.st_mtime_ns)


def hash_windows(file: IO[bytes], size: int, window: int) -> str:
    """Hash the size of a file and so many of its bytes at the head, in the middle and at the tail."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    for start in (0, max(0, (size - window) // 2), max(0, size - window)):
        file.seek(start)
        digest.update(file.read(window))
    return f"blake2b-sampled:{digest.hexdigest()}"


def record_together(path: str, contents: Iterable[FileRecord]) -> FileRecord:
    """Describe several files, in order, as one input: their size in all, and one hash over sizes and hashes."""
    size = 0
    digest = hashlib.blake2b(digest_size=16)
    for file in contents:
        size += file.size
        digest.update(f"{file.size} {file.hash}\n".encode())
    return FileRecord(path, size, f"blake2b:{digest.hexdigest()}")


def identity_of(settings: dict[str, Any], inputs: Iterable[FileRecord]) -> str:
    """Hash settings and the content of inputs, independent of their paths: 32 hexadecimal digits."""
    return hash_json([settings, [[part for part in file.content if part is not None] for file in inputs]], 16)


def hash_json(content: Any, num_bytes: int = 8) -> str:
    """Hash JSON values to hexadecimal digits, two a byte, for the names of files that depend on all of them."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=num_bytes).hexdigest()


def stamp_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return size, both times and inode, which together change when somebody writes to a file or replaces it."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def find_changed(folder: Path, records: Collection[FileRecord], since: Path, memo: Memo | None = None) -> str | None:
    """Find the first of recorded files that was removed, replaced or edited since; return what is wrong, a sentence.

    Their paths are relative to `folder`; `since` is the file that records them.
    """
    stats: dict[str, tuple[int, int]] = {}
    for file in records:
        with suppress(OSError, ValueError):  # missing, or its name is none
            stat = os.stat(os.path.join(folder, file.path))  # half the time of pathlib's, for 150,000 files
            stats[file.path] = (stat.st_size, stat.st_mtime_ns)
    suspects = [file for file in records if stats.get(file.path) != (file.size, file.time)]
    if not suspects:
        return None
    from clipcid_cli.formats.memo import Memo  # most files are as they were

    memo = memo or Memo()

    def is_same(suspect: FileRecord) -> bool:
        try:
            size, _ = stats[suspect.path]
            return size == suspect.size and memo.record(folder / suspect.path).hash == suspect.hash
        except (KeyError, OSError):
            return False

    with ThreadPoolExecutor(_THREADS) as pool:
        same = pool.map(is_same, suspects)
        changed = next((file for file, is_it in zip(suspects, same, strict=True) if not is_it), None)
    if changed is None:
        return None
    path = folder / changed.path
    if not path.is_file():
        return f"{path} is missing, although {since} says it was written."
    now = record(path)
    sizes = f"{changed.size:,} bytes then, {now.size:,} now"
    if now.size == changed.size:
        sizes = f"its {now.size:,} bytes are others now"
    return f"{path} has changed since {since} was written: {sizes}."


def validate_unchanged(
    folder: Path, records: Collection[FileRecord], since: Path, fix: str, memo: Memo | None = None
) -> None:
    """Raise what `find_changed` finds; `fix` says what makes the files again."""
    changed = find_changed(folder, records, since, memo)
    if changed is not None:
        raise ClipcidError(changed, fix)


def find_lost(there: Sequence[FileRecord], now: Collection[FileRecord]) -> str:
    """Tell which of some files are no longer among those of now as they were; empty where all are, in the same order."""
    rest = iter([file.content for file in now])
    if all(file.content in rest for file in there):
        return ""
    contents = {file.content for file in now}
    names = {file.content[:2]: file.shard for file in now}
    changed = [file for file in there if file.content not in contents]
    renamed = [file for file in changed if file.content[:2] in names]
    gone = [Path(_name_file(file)).name for file in changed if file.content[:2] not in names]
    before, after = (len({_name_file(file) for file in files}) for files in (there, now))
    noun = "shard" if any(file.shard for file in there) else "file"
    parts = [f"{before:,} {noun}{'s' * (before != 1)} before, {after:,} now"] if before != after else []
    if renamed:
        first = renamed[0]
        parts.append(f"shards renamed: {len(renamed):,}, first {first.shard}, now {names[first.content[:2]]}")
    known = {file.content for file in there}
    new = [_name_file(file) for file in now if file.content not in known]
    lost = [_name_file(file) for file in changed]
    is_other = len(changed) == len(there) and not renamed
    if is_other and new and not set(map(os.path.dirname, lost)) & set(map(os.path.dirname, new)):
        parts.append(f"other data: {lost[0]} before, {new[0]} now")
    elif gone:
        gone = list(dict.fromkeys(gone))
        more = f" and {len(gone) - 3:,} more" if len(gone) > 3 else ""
        parts.append(f"changed or gone: {', '.join(gone[:3])}{more}")
    return "; ".join(parts) or "in another order"


def _name_file(file: FileRecord) -> str:
    """Return the path of a file; several shards may be parts of one list, as in ``list.csv#00000``."""
    return re.sub(r"#\d+$", "", file.path)
