"""Copies of rows on the disk, in groups of rows that are read together, for the time of a computation.

A group's rows lie in as many files as there are shards, and opening each file for every group takes longer than to compare
the rows. So rows are read once, in order, and copied: each process copies a share of the rows into one file, group by group.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.arrays import create_mapped
from clipcid_cli.formats.atomic import write_error
from clipcid_cli.formats.embeddings.row_files import RowFile
from clipcid_cli.formats.embeddings.rows import Rows

_FOLDER = ".grouped"


def create_copy(folder: Path, rank: int, rows: int, width: int) -> npt.NDArray[np.float16]:
    """Create the file of a process's copies and map it, float16 [rows, width]."""
    try:
        (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder / _FOLDER, error) from error
    return create_mapped(_path(folder, rank), np.dtype(np.float16), (rows, width))


def open_copies(folder: Path, sizes: Sequence[int], width: int) -> Rows:
    """Return the copies of all processes, one process's after another's, mapped as long as they are referred to.

    A mapped file keeps its space on the disk after it is removed.

    Args:
        sizes: Rows that each copied.
    """
    copied = []
    for rank, size in enumerate(sizes):
        if size:
            path = _path(folder, rank)
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns)
            copied.append(RowFile(path, (size, width), np.dtype(np.float16), 0, stamp, size=stat.st_size))
    return Rows(copied, width, as_stored=True, hold=True)


def remove_copies(folder: Path) -> None:
    """Remove all copies, those of a run that was killed too."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def _path(folder: Path, rank: int) -> Path:
    return folder / _FOLDER / f"{rank}.rows"
