"""Fingerprints that are remembered, so that a file is hashed once and not at every start.

The hash of a file is kept with its size and modification time, in one table for all files of a work directory. A file of
another size or time is hashed again. Only speed depends on the table: it may be removed at any time.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file, remove_abandoned
from clipcid_cli.formats.output import fingerprint_file

_SCHEMA = pa.schema([("path", pa.string()), ("size", pa.int64()), ("time", pa.int64()), ("hash", pa.string())])


class FingerprintCache:
    """The fingerprints of files by path; call it as :func:`fingerprint_file`, from any thread."""

    def __init__(self, path: Path) -> None:
        """Read the table.

        Args:
            path: The table; it need not exist.
        """
        self._path = path
        self._known: dict[str, tuple[int, int, str]] = {}
        self._new = False
        try:
            rows = pq.read_table(path, schema=_SCHEMA).to_pydict()
        except (OSError, pa.ArrowException):
            return
        self._known = {
            name: (size, time, found)
            for name, size, time, found in zip(rows["path"], rows["size"], rows["time"], rows["hash"], strict=True)
        }

    def __call__(self, path: Path) -> dict[str, Any]:
        """Return what ``fingerprint_file(path)`` returns."""
        name, stat = os.path.abspath(path), path.stat()
        stamp = stat.st_size, stat.st_mtime_ns
        known = self._known.get(name)
        if known is not None and known[:2] == stamp:
            return {"path": str(path), "size": known[0], "hash": known[2]}
        found = fingerprint_file(path)
        self._known[name] = (*stamp, found["hash"])
        self._new = True
        return found

    def save(self) -> None:
        """Write the table where something was added to it, and it can be written."""
        if not self._new:
            return
        named = {name: entry for name, entry in self._known.items() if _is_text(name)}
        rows = [(name, *entry) for name, entry in sorted(named.items())]
        table = pa.table([pa.array(column) for column in zip(*rows, strict=True)], schema=_SCHEMA)
        remove_abandoned(self._path.parent.glob(f".{self._path.name}.*.partial"))
        with suppress(ClipcidError, OSError), atomic_file(self._path, shared=True) as file:  # two runs may save at once
            pq.write_table(table, file)
        self._new = False


def _is_text(name: str) -> bool:
    """Tell whether a path is valid UTF-8, as the table's are."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
