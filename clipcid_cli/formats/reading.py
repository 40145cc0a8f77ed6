"""Opening files that someone else may have damaged: whatever a library raises over one becomes one error that names it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from clipcid_cli.errors import ClipcidError


def open_regular(path: Path | str) -> IO[bytes]:
    """Open a file for reading, unbuffered.

    Raises:
        OSError: when it cannot be opened, or is no regular file: reading a FIFO would wait for ever.
    """
    # Without O_NONBLOCK already opening a FIFO waits for its writer; regular files do not heed it.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # Python's, of a null character in the name
        raise OSError(f"its name is impossible: {error}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
            raise OSError(f"it is a {kind}, not a file")
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str) -> bytes:
    """Return the content of a file; errors as `open_regular`'s."""
    with open_regular(path) as file:
        return file.read()


def read_part(descriptor: int, path: str, offset: int, size: int) -> bytes:
    """Return part of the file at `path`, which is open; an OSError where the file ends within it."""
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise OSError(f"{path} ends {size - len(data)} bytes early")
    return data


@contextmanager
def reading(path: Path, expected: str, fix: str) -> Iterator[IO[bytes]]:
    """Open `path` for reading, unbuffered; whatever is raised while it is read becomes one error.

    Args:
        expected: What the file should be, with its article: "a parquet file".
    """
    try:
        with open_regular(path) as file:
            yield file
    except ClipcidError:
        raise
    except OSError as error:
        raise ClipcidError(f"{path} cannot be read: {describe(error)}.", fix) from error
    except Exception as error:
        raise ClipcidError(f"{path} cannot be read as {expected}: {describe(error)}.", fix) from error


def describe(error: Exception) -> str:
    """Return the reason an error gives, on one line of bounded length and without a full stop."""
    if isinstance(error, KeyError):
        return f"it has no entry {error}"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(reason.split())[:300].rstrip(".")
