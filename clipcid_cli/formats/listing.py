"""Sizes and times of many files, by one listing of each folder: a look at each file of 41,000 shards takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple


class Stat(NamedTuple):
    """What a listing says of a file: its size in bytes and the time of its last change in ns."""

    size: int
    time: int


def list_recorded(folder: Path, entries: Iterable[dict[str, Any]]) -> dict[str, Stat]:
    """List the folders that hold some files, and return what is known of every file in them.

    Args:
        entries: What a sidecar records of the files, each with its ``path`` in the folder.

    Returns:
        By path in the folder, as the sidecar names the files.
    """
    found: dict[str, Stat] = {}
    for parent in {os.path.dirname(entry["path"]) for entry in entries}:
        with suppress(OSError), os.scandir(folder / parent) as files:
            for file in files:
                with suppress(OSError):  # a link that leads nowhere
                    stat = file.stat()
                    found[os.path.join(parent, file.name)] = Stat(stat.st_size, stat.st_mtime_ns)
    return found


def is_as_listed(stat: Stat | None, recorded: dict[str, Any]) -> bool:
    """Tell whether a file has the ``size`` and the ``time`` that were recorded."""
    return stat is not None and stat == (recorded["size"], recorded["time"])
