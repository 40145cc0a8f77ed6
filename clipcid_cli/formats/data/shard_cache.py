"""Local copies, for reading samples in any order: of shards behind URLs, of commands, of the images in parquet files.

Their folder is of limited size. A shard is fetched by the first process of the host that needs it, and the least recently
opened copies make room for it.
Whoever fetches a copy or reads from it holds the file by a lock, which ends with its process; nobody removes what is held.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.image_column import copy_images
from clipcid_cli.formats.data.remote import describe_shard, expect_answers, open_remote
from clipcid_cli.formats.files import lock, write_error
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.user_cache import make_private

FETCHED_AT_ONCE = 4
"""Copies that a process fetches ahead at a time."""

# Seconds between looks at a copy that another process is fetching.
_ASK_AGAIN = 0.02


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
                with suppress(FileNotFoundError):  # given up just now
                    if path != apart and path.name != ".lock" and not path.is_dir():
                        files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            used = sum(taken for _, taken, _ in files)
            for _, taken, path in sorted(files):
                if used + size > self.max_bytes and _remove_unused(path):
                    used -= taken
            if used + size > self.max_bytes:
                raise ClipcidError(
                    f"{self.folder} is limited to {self.max_bytes:,} bytes: "
                    f"copies in use take {used:,}, and the next takes {size:,}.",
                    "Raise --cache-size, or set CLIPCID_CACHE to a separate folder for each run.",
                )
            yield


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
                descriptor = os.open(self.local, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch()
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with suppress(OSError):  # another user's copy
                os.utime(descriptor)
            return descriptor

    def fetch(self) -> None:
        """Fetch the copy where it is missing, or wait for the process that is fetching it."""
        partial = self.local.with_name(f".{self.local.name}.partial")
        try:
            make_private(self.cache.folder)
            while not self.local.exists():
                try:
                    # Not waited for, but asked for again: once whole, this very file is the copy, and its readers hold it.
                    with lock(partial, wait=False):
                        self._fetch_into(partial)
                except BlockingIOError:
                    time.sleep(_ASK_AGAIN)
        except OSError as error:
            raise write_error(self.cache.folder, error) from error

    def _fetch_into(self, partial: Path) -> None:
        try:
            if self.local.exists():
                partial.unlink()
                return
            expect_answers(self.shard.path)  # by whom it was listed
            found = describe_shard(self.shard.path)
            if found.content != self.shard.content:
                raise ClipcidError(
                    f"{self.shard.path} has changed since it was listed.",
                    "Remove index/ from the work directory, then run the same command again: the data is listed anew.",
                )
            with self.cache.room_for(found.size, partial):  # 0 of a command
                os.truncate(partial, found.size)  # so that others see what it will take
            with partial.open("r+b") as file:
                if self.column is not None:
                    copy_images(self.shard.path, self.column, file)
                else:
                    with open_remote(self.shard.path) as source:
                        shutil.copyfileobj(source, file)
                file.truncate()
            with self.cache.room_for(partial.stat().st_size, partial):
                partial.replace(self.local)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process holds it."""
    try:
        with lock(path, wait=False):
            path.unlink()
    except (BlockingIOError, PermissionError):
        return False
    return True


def fetch_ahead(copies: Iterable[ShardCopy]) -> None:
    """Fetch copies in the background, in order; those asked for earlier and not begun are given up.

    What goes wrong shows when a copy is opened.
    """
    waiting = _start_fetching()
    with waiting.mutex:
        waiting.queue.clear()
    for copy in copies:
        waiting.put(copy)


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
