"""A memo of the hashes of files that were taken.

A hash is taken once and remembered as git does: with size, both times and inode, and not while the file may still change
without a trace. The table is in the user's own cache, so that a work directory from elsewhere brings no hashes of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.files import read_regular, write_text
from clipcid_cli.formats.fingerprint import FileRecord, hash_json, record, stamp_of
from clipcid_cli.formats.user_cache import cache_folder, make_private

_SECOND = 10**9
_TICK = _SECOND // 10  # above the few ms of kernels, for clocks that differ a little
_THREADS = 16  # hashing waits for the disk


class _Remembered(FileRecord, frozen=True, omit_defaults=True):
    """A record, and what else changes when somebody writes to the file or puts another one in its place."""

    changed: int = 0  # time of the last change of content, name or owner, in ns
    inode: int = 0

    @property
    def stamp(self) -> tuple[int, int, int, int]:
        return self.size, self.time, self.changed, self.inode


def _is_settled(status: os.stat_result, now: int) -> bool:
    """Tell whether a later change would have another time: clocks of file systems tick, some only every other second."""
    latest = max(status.st_mtime_ns, status.st_ctime_ns)
    return latest + (_TICK if latest % _SECOND else 2 * _SECOND) < now


def memo_table(folder: Path) -> Path | None:
    """Return the table of what is remembered of a folder's files; None where the user has no folder for caches."""
    try:
        return cache_folder() / "fingerprints" / f"{hash_json(str(folder.resolve()))}.json"
    except RuntimeError:  # no home
        return None


class Memo:
    """The records of files by path; may be used from any thread."""

    def __init__(self, table: Path | None = None) -> None:
        """Read the table, which need not exist; None remembers nothing beyond this object."""
        self.table = table
        self._known: dict[str, _Remembered] = {}
        self._is_new = False
        if table is not None:
            with suppress(Exception):  # missing, or damaged in whatever way
                known = msgspec.convert(json.loads(read_regular(table)), list[_Remembered])
                self._known = {remembered.path: remembered for remembered in known}

    def record(self, path: Path) -> FileRecord:
        """Return what `record` returns; a file that is still the one it was is not read again."""
        place = os.path.abspath(path)
        before, now = path.stat(), time.time_ns()
        known = self._known.get(place)
        if known is not None and known.stamp == stamp_of(before):
            return FileRecord(str(path), known.size, known.hash, known.time)
        taken = record(path)
        if stamp_of(path.stat()) == stamp_of(before) and _is_settled(before, now):
            self._known[place] = _Remembered(
                place, taken.size, taken.hash, taken.time, changed=before.st_ctime_ns, inode=before.st_ino
            )
            self._is_new = True
        return taken

    def record_all(self, paths: Iterable[Path]) -> list[FileRecord]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.record, paths))

    def save(self) -> None:
        """Write the table where something was added to it, and it can be written."""
        if self.table is None or not self._is_new:
            return
        known = msgspec.to_builtins(sorted(self._known.values(), key=lambda remembered: remembered.path))
        with suppress(ClipcidError, OSError):
            make_private(self.table.parent)
            write_text(self.table, json.dumps(known), shared=True)  # two runs may save at once
        self._is_new = False
