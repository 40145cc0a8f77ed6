"""One way to open a file of data: a local one by default; behind a URL or a command only where its path says so."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.files import open_regular
from clipcid_cli.formats.fingerprint import FileRecord, hash_windows

_WINDOW = 2**16  # of a local shard, for its hash


def open_source(path: str) -> Any:
    """Open a file, what is behind a URL, or the output of a command, which is run."""
    if is_remote(path):
        from clipcid_cli.formats.data.remote import open_remote  # fsspec takes a while

        return open_remote(path)
    return open_regular(path)


def describe_shard(path: str) -> FileRecord:
    """Describe a file by a hash of its size and windows of 64 KiB: `fingerprint.record` would read most shards whole.

    What is behind a URL is described by what its server says of it.
    """
    if is_remote(path):
        from clipcid_cli.formats.data.remote import describe_file

        return describe_file(path)
    with naming_shard(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        return FileRecord(path, size, hash_windows(file, size, _WINDOW))


@contextlib.contextmanager
def naming_shard(path: str) -> Iterator[None]:
    """Turn any OSError inside the block into one error that names the shard."""
    try:
        yield
    except OSError as error:
        raise ClipcidError(
            f"Shard {path} cannot be read: {error.strerror or error}.", "Check the path and its permissions."
        ) from error


def local_file(path: str) -> contextlib.AbstractContextManager[Path]:
    """Give a file of this disk with the content of `path`: the file itself, or else a temporary copy."""
    if is_remote(path):
        from clipcid_cli.formats.data.remote import temporary_copy

        return temporary_copy(path)
    return contextlib.nullcontext(Path(path))
