"""Arrays on the disk, larger than memory, for the time of a computation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.atomic import write_error

Number = TypeVar("Number", bound=np.generic)


def create_mapped(path: Path, dtype: np.dtype[Number], shape: tuple[int, ...]) -> npt.NDArray[Number]:
    """Create a file and map it as an array of zeros, [*shape]; an array without elements has no file.

    Its blocks are reserved first: where the disk is full, writing to a mapped file without them kills the process (SIGBUS).

    Raises:
        ClipcidError: when the disk has no room for it, or the file cannot be created.
    """
    if not all(shape):
        return np.empty(shape, dtype)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * dtype.itemsize)
        return np.memmap(path, dtype, "r+" if path.stat().st_size else "w+", shape=shape)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise write_error(path, error) from error
