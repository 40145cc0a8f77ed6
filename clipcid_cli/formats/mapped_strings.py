"""A column of strings on the disk rather than in memory: written chunk by chunk, then mapped to look up any row.

Arrow looks rows up quickly in a single array only, and the keys of 400 million images take 10 GB and more.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import pyarrow as pa

from clipcid_cli.formats.atomic import write_error

_ROWS_AT_ONCE = 2**20


def map_strings(folder: Path, chunks: Iterable[pa.Array]) -> pa.LargeStringArray:
    """Write strings to unnamed files, which vanish with the array, and map them.

    Args:
        folder: Where there is room for the strings and 8 bytes more each; made where it is missing.
        chunks: The strings, without nulls, as Arrow arrays of any length.

    Raises:
        ClipcidError: when the files cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as offsets, TemporaryFile(dir=folder) as text:
            end, rows = 0, 0
            offsets.write(np.zeros(1, np.int64).tobytes())
            for chunk in chunks:
                for start in range(0, len(chunk), _ROWS_AT_ONCE):
                    part = chunk.slice(start, _ROWS_AT_ONCE).cast(pa.large_string())
                    _, bounds, data = part.buffers()
                    ends = np.frombuffer(bounds, np.int64)[part.offset : part.offset + len(part) + 1]
                    first, last = int(ends[0]), int(ends[-1])
                    if last > first:
                        text.write(data[first:last])
                    offsets.write((ends[1:] - first + end).tobytes())
                    end, rows = end + last - first, rows + len(part)
            return pa.LargeStringArray.from_buffers(rows, _map(offsets), _map(text))
    except OSError as error:
        raise write_error(folder, error) from error


def _map(file: IO[bytes]) -> pa.Buffer:
    file.flush()
    if not file.tell():
        return pa.py_buffer(b"")
    return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
