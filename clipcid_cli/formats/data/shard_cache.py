"""Local copies, for reading samples in any order: of shards behind URLs, of commands, of the images in parquet files.

Their folder is of limited size. A shard is fetched by the first process of the host that needs it, and the least recently
opened copies make room for it.
Whoever fetches a copy or reads from it holds the file by a lock, which ends with its process; nobody removes what is held.

    <copy>          the content
    <copy>.json     its size and hash when it was fetched; its time is that of the last opening

A copy is compared with its hash when a user first opens it, and again only where its inode or ctime differ: what was seen is
remembered in the user's own cache folder, whoever else writes to this one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.activity import note_received
from clipcid_cli.formats.data.image_column import copy_images
from clipcid_cli.formats.data.opening import describe_shard, open_source
from clipcid_cli.formats.data.remote import expect_answers
from clipcid_cli.formats.files import describe, lock, open_regular, read_regular, write_error, write_text
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.user_cache import make_private, user_folder

FETCHED_AT_ONCE = 4
"""Copies that a process fetches ahead at a time."""

# Seconds between looks at a copy that another process is fetching.
_ASK_AGAIN = 0.02
_PIECE = 2**22  # bytes that are copied or hashed at a time
_RECORD = ".json"


@dataclasses.dataclass(frozen=True)
class ShardCache:
    """A folder of copies, which have `max_bytes` at most, those being fetched included."""

    folder: Path
    max_bytes: int

    @contextmanager
    def room_for(self, size: int, apart: Path) -> Iterator[None]:
        """Remove the copies least recently opened until `size` bytes more are within the limit; one process at a time.

        The bytes of the file `apart` do not count.
        """
        with lock(self.folder / ".lock"):
            files = list[tuple[int, int, Path]]()
            for path in self.folder.iterdir():
                if path in (apart, self.folder / ".lock") or path.suffix == _RECORD:
                    continue
                with suppress(FileNotFoundError):  # given up just now
                    if path.is_dir():
                        continue
                    record = _record_of(path)
                    opened = record if record.exists() else path
                    files.append((opened.stat().st_mtime_ns, path.stat().st_size, path))
            used = sum(taken for _, taken, _ in files)
            for _, taken, path in sorted(files):
                if used + size > self.max_bytes and _remove_unused(path):
                    used -= taken
            if used + size > self.max_bytes:
                raise self.full(f"copies in use take {used:,}, and the next takes {size:,}")
            yield

    def copy(self, fingerprint: FileRecord, listing: str, column: str | None) -> ShardCopy:
        """Return the copy of a shard in the cache, whether it exists or not."""
        return ShardCopy(self, fingerprint, listing, column)

    def fetch_ahead(self, copies: Iterable[ShardCopy]) -> None:
        """Fetch copies in the background, in order; those asked for earlier and not begun are given up.

        What goes wrong shows when a copy is opened.
        """
        waiting = _start_fetching()
        with waiting.mutex:
            waiting.queue.clear()
        for copy in copies:
            waiting.put(copy)

    def full(self, why: str) -> ClipcidError:
        """Return the error for a copy that is not within the limit."""
        return ClipcidError(
            f"{self.folder} is limited to {self.max_bytes:,} bytes: {why}.",
            "Raise --cache-size, or set CLIPCID_CACHE to a separate folder for each run.",
        )


class CopyRecord(msgspec.Struct, frozen=True):
    """What a copy was when it was fetched."""

    size: int
    hash: str


@dataclasses.dataclass(frozen=True)
class ShardCopy:
    """The copy of one shard, whether it exists or not."""

    cache: ShardCache
    shard: FileRecord  # the shard as it was described when it was listed
    listing: str  # hash of what the listing found: what was listed as another content is another copy
    column: str | None = None  # of a parquet file, whose images alone are copied

    @property
    def local(self) -> Path:
        """Where the copy is, or would be."""
        return self.cache.folder / f"{self.listing}.{'tar' if self.column is None else 'images'}"

    def open(self) -> int:
        """Return a descriptor of the copy, which is fetched where it is missing. It stays whole while it is open."""
        while True:
            try:
                descriptor = os.open(self.local, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch()
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not self._is_whole(descriptor):
                self._discard(descriptor)
                continue
            with suppress(OSError):  # another user's copy
                os.utime(_record_of(self.local))
            return descriptor

    def _discard(self, descriptor: int) -> None:
        """Close a copy, and remove it unless another process has replaced it."""
        try:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self.local.stat()):
                    _remove(self.local)
        except OSError as error:
            raise write_error(self.local, error) from error
        finally:
            os.close(descriptor)

    def _is_whole(self, descriptor: int) -> bool:
        """Tell whether an open copy is what was fetched; it is read where this user has not seen it so before."""
        try:
            record = _read_record(self.local)
        except (OSError, msgspec.MsgspecError):
            return False
        if os.fstat(descriptor).st_size != record.size:
            return False
        memory = _memory_of(self.local)
        seen = _describe_seen(descriptor, record)
        with suppress(OSError):
            if read_regular(memory) == seen:
                return True
        if _hash_file(descriptor) != record.hash:
            return False
        _remember(memory, seen)
        return True

    def find_problem(self) -> str | None:
        """Read the copy, and return how it differs from what was fetched; None where it does not, or there is none."""
        try:
            with open_regular(self.local) as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                record = _read_record(self.local)
                size = os.fstat(file.fileno()).st_size
                if size != record.size:
                    return f"has {size:,} bytes; {record.size:,} were fetched"
                content_hash = _hash_file(file.fileno())
        except FileNotFoundError as error:
            return None if error.filename == str(self.local) else "has no record of what was fetched"
        except (OSError, msgspec.MsgspecError) as error:
            return f"cannot be compared with what was fetched: {describe(error)}"
        return (
            None
            if content_hash == record.hash
            else f"has other content than was fetched: {content_hash}, not {record.hash}"
        )

    def fetch(self) -> None:
        """Fetch the copy where it is missing, or wait for the process that is fetching it."""
        partial = self.local.with_name(f".{self.local.name}.partial")
        try:
            make_private(self.cache.folder)
            written = 0
            while not self.local.exists():
                try:
                    # Not waited for, but asked for again: once whole, this very file is the copy, and its readers hold it.
                    with lock(partial, wait=False):
                        self._fetch_into(partial)
                except BlockingIOError:
                    time.sleep(_ASK_AGAIN)
                    with suppress(FileNotFoundError):
                        last, written = written, partial.stat().st_mtime_ns
                        if written != last:
                            note_received()
        except OSError as error:
            raise write_error(self.cache.folder, error) from error

    def _fetch_into(self, partial: Path) -> None:
        try:
            if self.local.exists():
                partial.unlink()
                return
            expect_answers(self.shard.path)  # by whom it was listed
            self._validate_unchanged()
            with self.cache.room_for(self.shard.size, partial):  # 0 of a command
                os.truncate(partial, self.shard.size)  # so that others see what it will take
            with partial.open("r+b") as file:
                record = self._copy_into(file)
                self._validate_unchanged()
                os.fsync(file.fileno())
                with self.cache.room_for(record.size, partial):
                    write_text(_record_of(self.local), msgspec.json.encode(record).decode())
                    partial.replace(self.local)
                    _remember(_memory_of(self.local), _describe_seen(file.fileno(), record))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _validate_unchanged(self) -> None:
        if describe_shard(self.shard.path).content != self.shard.content:  # its path is described without secrets
            raise ClipcidError(
                f"{self.shard.path} has changed since it was listed.",
                "Remove index/ from the work directory, then run the same command again: the data is listed anew.",
            )

    def _copy_into(self, file: IO[bytes]) -> CopyRecord:
        """Write the copy to a file; each piece is hashed while the next is received."""
        if self.column is not None:
            copy_images(self.shard.path, self.column, file)
            size = file.tell()
            file.truncate()
            return CopyRecord(size, _hash_file(file.fileno()))
        digest = hashlib.sha256()  # the fastest there is where processors compute it
        hashed: Future[None] | None = None
        with open_source(self.shard.path) as source, ThreadPoolExecutor(1) as pool:
            while piece := source.read(_PIECE):
                file.write(piece)
                if file.tell() > self.cache.max_bytes:
                    raise self.cache.full(f"{self.shard.path} is larger")
                if hashed is not None:
                    hashed.result()
                hashed = pool.submit(digest.update, piece)
        file.truncate()
        return CopyRecord(file.tell(), digest.hexdigest())


def _record_of(copy: Path) -> Path:
    return copy.with_name(copy.name + _RECORD)


def _read_record(copy: Path) -> CopyRecord:
    return msgspec.json.decode(read_regular(_record_of(copy)), type=CopyRecord)


def _memory_of(copy: Path) -> Path:
    """Return the file in which the user's last look at a copy is remembered."""
    name = hashlib.blake2b(os.fsencode(copy.absolute()), digest_size=16).hexdigest()
    return user_folder() / "seen" / name


def _describe_seen(descriptor: int, record: CopyRecord) -> bytes:
    stat = os.fstat(descriptor)
    return json.dumps([stat.st_ino, stat.st_ctime_ns, record.size, record.hash]).encode()


def _remember(memory: Path, seen: bytes) -> None:
    with suppress(OSError):  # it saves time alone
        memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        memory.write_bytes(seen)


def _hash_file(descriptor: int) -> str:
    digest = hashlib.sha256()
    place = 0
    while piece := os.pread(descriptor, _PIECE, place):
        digest.update(piece)
        place += len(piece)
        note_received()
    return digest.hexdigest()


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process holds it."""
    try:
        with lock(path, wait=False):
            _remove(path)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _remove(copy: Path) -> None:
    """Remove a copy with what is known of it."""
    copy.unlink()
    for path in (_record_of(copy), _memory_of(copy)):
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _start_fetching() -> queue.Queue[ShardCopy]:
    """Start the threads that fetch ahead; they end with the process, whatever they are doing."""
    waiting: queue.Queue[ShardCopy] = queue.Queue()

    def fetch() -> None:
        while True:
            with suppress(ClipcidError):
                waiting.get().fetch()

    for _ in range(FETCHED_AT_ONCE):
        threading.Thread(target=fetch, daemon=True).start()
    return waiting
