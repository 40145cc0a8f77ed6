"""Files appear whole or not at all.

Everything is written to a hidden sibling, flushed to the disk, and renamed. The sibling's name is fixed, so the next run
overwrites what a killed one left; the lock of the output folder keeps two writers apart.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from clipcid_cli.errors import ClipcidError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

# What the system says of a disk that is full, over its quota or limit, or failing.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

_ABANDONED_SECONDS = 3600.0
_LOCK = ".lock"
_PIECES_AT_ONCE = 8192


@contextmanager
def atomic_file(path: Path, sibling: str = "partial") -> Iterator[IO[bytes]]:
    """Open `path` for writing such that it exists under its name only when complete.

    Args:
        path: Final name; missing parent folders are created.
        sibling: Suffix of the hidden sibling. Where several runs may write the same file, each needs one of its own.

    Yields:
        A binary file. When the block ends without an error the file is synced and renamed to `path`; when it raises,
        the partial file is removed and whatever `path` held before is untouched.

    Raises:
        ClipcidError: when the disk is full or the folder cannot be written to.
    """
    partial = path.with_name(f".{path.name}.{sibling}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):  # where its folder could not be made
            partial.unlink(missing_ok=True)
        refusal = _find_refusal(error)
        if refusal is not None and refusal.filename in (None, *map(str, (path, partial, *path.parents))):
            raise write_error(path, refusal) from error
        raise


def _find_refusal(error: BaseException) -> OSError | None:
    """Return what the system refused: the error itself, or the one beneath a library's own, as of `torch.save`."""
    if isinstance(error, OSError):
        return error
    beneath = error.__cause__ or error.__context__
    return beneath if isinstance(beneath, OSError) and beneath.errno in _DISK_ERRORS else None


@contextmanager
def named_file(path: Path, overwrite: bool) -> Iterator[IO[bytes]]:
    """Open a file that the user named, as `atomic_file` does; a file of other content is replaced only on request.

    Args:
        overwrite: Whether a file of other content may be replaced. One with the same bytes is always accepted.

    Raises:
        ClipcidError: when a file of other content exists; it is left unchanged.
    """
    with atomic_file(path) as file:
        yield file
        file.flush()
        if path.exists() and not (overwrite and path.is_file()) and not filecmp.cmp(file.name, path, shallow=False):
            raise ClipcidError(
                f"{path} already exists with other content.",
                "Add --overwrite to replace it, or choose another name.",
            )


def refuse_unwritable(path: Path) -> None:
    """Refuse a path at which no file can be made, before the work whose result it is to hold; nothing is made.

    Raises:
        ClipcidError: when there is a folder, or a parent is no folder or may not be written to.
    """
    if path.is_dir():
        raise write_error(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise write_error(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise write_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold a temporary folder, so that `remove_abandoned` of another run leaves it; the kernel ends it with the process."""
    with (folder / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_held(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or nobody can tell
        return True
    return False


def remove_abandoned(partials: Iterable[Path]) -> None:
    """Remove those of the hidden siblings, files or folders, that are an hour old and that nobody holds or writes to.

    The time of a folder does not change while its files are written: who needs one for longer must hold it.
    """
    for path in partials:
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime <= _ABANDONED_SECONDS:
                continue
            if path.is_dir():
                if _is_held(path):
                    continue
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def write_error(path: Path, error: OSError) -> ClipcidError:
    """Return the error for a `path` that could not be written."""
    if isinstance(error, IsADirectoryError | FileExistsError | NotADirectoryError):
        fix = "Remove or rename what is in its place, then run the same command again."
    elif isinstance(error, FileNotFoundError):
        fix = (
            "Check that its folder is there and that it is no link to a missing file, then run the same command again."
        )
    elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
        fix = "Allow writing there, or choose another folder."
    else:
        fix = (
            "Free some space or choose another folder, then run the same command again: it continues where it stopped."
        )
    return ClipcidError(f"Could not write {path}: {error.strerror or error}.", fix)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON; NaN and infinities are refused since JSON has none."""
    try:
        _write_json(path, value, ensure_ascii=False)
    except UnicodeEncodeError:  # the name of a file that is not UTF-8: escaped, it is read back as it is
        _write_json(path, value, ensure_ascii=True)


def _write_json(path: Path, value: Any, *, ensure_ascii: bool) -> None:
    # Some at a time: the sidecar of 41,000 shards would take 150 MB as a whole.
    pieces = json.JSONEncoder(indent=2, ensure_ascii=ensure_ascii, allow_nan=False).iterencode(value)
    with atomic_file(path) as file:
        while text := "".join(islice(pieces, _PIECES_AT_ONCE)):
            file.write(text.encode("utf-8"))
        file.write(b"\n")


def write_npy(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an array to `path` in npy form, without pickling."""
    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table to `path` as parquet (zstd); the same table gives the same bytes."""
    import pyarrow.parquet as pq  # only commands that write parquet wait for it

    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def pack_csv(frame: pd.DataFrame, header: bool = True) -> bytes:
    """Return a frame as comma-separated text without its index, UTF-8."""
    text = io.StringIO()
    frame.to_csv(text, index=False, header=header, lineterminator="\n")
    return text.getvalue().encode("utf-8")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame to `path` as comma-separated text, whole or not at all."""
    write_bytes(path, pack_csv(frame))
