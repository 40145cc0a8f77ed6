"""How files are read and written: damage is one error that names the file, and what is written is there whole or not at all.

Whatever a library raises over a file that someone else may have damaged becomes that error. A file is written to a hidden
sibling, flushed to the disk, and renamed. The sibling's name is fixed, so the next run removes what a killed one left. It is
made anew, so a link that lies there is never followed. The lock of the output folder keeps two writers apart, or else one of
the sibling. The files of a step's output appear so in a work folder, from which `output.py` moves them to their places.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from clipcid_cli.at_work import note_work
from clipcid_cli.errors import ClipcidError, TooManyBytesError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

LARGEST_TEXT = 2**26
"""Bytes of a configuration, a list of names or a log; real ones have a hundredth."""

_SECONDS_BETWEEN_TRIES = 0.1
# What the system says of a disk that is full, over its quota or limit, or failing.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def open_regular(path: Path | str) -> IO[bytes]:
    """Open a file for reading, unbuffered.

    Raises:
        OSError: when it cannot be opened, or is no regular file: reading a FIFO would wait for ever.
    """
    # Without O_NONBLOCK already opening a FIFO waits for its writer; regular files do not heed it.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # Python's, of a null character in the name
        raise OSError(f"its name is invalid: {error}") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
            raise OSError(f"it is a {kind}, not a file")
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str, max_bytes: int | None = None) -> bytes:
    """Return the content of a file; errors as `open_regular`'s, and a TooManyBytesError beyond `max_bytes`."""
    with open_regular(path) as file:
        if max_bytes is not None:
            validate_size(str(path), os.fstat(file.fileno()).st_size, max_bytes)
        return file.read()


def validate_size(path: str, size: int, max_bytes: int) -> None:
    """Raise a TooManyBytesError for a file of a sample that has more than `max_bytes`."""
    if size > max_bytes:
        raise TooManyBytesError(f"{path} has {size:,} bytes, more than {max_bytes:,}")


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


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold a file, made where it is missing, and give its descriptor, open for reading and writing.

    The kernel ends a lock with its process, however that ends; it holds between the hosts of a shared disk. A link, or a
    second name of a file, is refused: the holder writes to what it holds.

    Args:
        wait: Whether to wait for the process that holds it; if not, that is a BlockingIOError.
    """
    held = False
    while not held:
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o666)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise FileExistsError(errno.EEXIST, "it is another file, not a lock", str(path))
            while not _try_lock(descriptor, wait=wait):
                note_work()  # the run that holds it does
                time.sleep(_SECONDS_BETWEEN_TRIES)
            with suppress(FileNotFoundError):  # removed or renamed before it was held
                held = os.path.samestat(status, path.lstat())
            if held:
                yield descriptor
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a file at once, or tell that another process holds it, which is an error unless that is waited for."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        return False
    return True


@contextmanager
def atomic_file(path: Path, shared: bool = False) -> Iterator[IO[bytes]]:
    """Open `path` for writing such that it exists under its name only when complete; what it held before stays till then.

    A file that is `shared` may be written by several processes at once: one waits for the other, and the last one's stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(partial) if shared else nullcontext():
            try:
                with partial.open("wb") if shared else create(partial) as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                    partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)  # not once it is renamed: the next process may have made its own
                raise
    except BaseException as error:
        refusal = _find_refusal(error)
        if refusal is not None and refusal.filename in (None, *map(str, (path, partial, *path.parents))):
            raise write_error(path, refusal) from error
        raise


def create(path: Path, mode: str = "xb") -> IO[Any]:
    """Make a file anew and open it; a file or a link of its name is removed before, and never written through.

    Args:
        mode: As of `open`, with an x: ``x+b`` for one that is read too.
    """
    path.unlink(missing_ok=True)
    return path.open(mode)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: only then does a file that was renamed there outlast a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise write_error(folder, error) from error
        # else of a file system that does not sync folders, or of one that may not be listed


def _find_refusal(error: BaseException) -> OSError | None:
    """Return what the system refused: the error itself, or the one beneath a library's own, as of `torch.save`."""
    if isinstance(error, OSError):
        return error
    beneath = error.__cause__ or error.__context__
    return beneath if isinstance(beneath, OSError) and beneath.errno in _DISK_ERRORS else None


@contextmanager
def named_file(path: Path, overwrite: bool) -> Iterator[IO[bytes]]:
    """Open a file that the user named, as `atomic_file` does; one of other content is replaced only with `overwrite`."""
    with atomic_file(path) as file:
        yield file
        file.flush()
        if path.exists() and not (overwrite and path.is_file()) and not filecmp.cmp(file.name, path, shallow=False):
            raise ClipcidError(
                f"{path} already exists with other content.",
                "Add --overwrite to replace it, or choose another name.",
            )
    sync_folder(path.parent)


def validate_writable(path: Path) -> None:
    """Refuse a path at which no file can be made, before the work whose result it is to hold; its folder must exist."""
    if path.is_dir():
        raise write_error(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    parent = path.absolute().parent
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise write_error(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if above != parent:
        raise ClipcidError(
            f"Could not write {path}: there is no folder {parent}.", "Make that folder, or choose another place."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise write_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where that cannot be, as on another disk; what has the name is replaced."""
    source = source.resolve()  # not a link to it, which would lead nowhere once it is gone
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        with suppress(OSError):
            os.link(source, target)
            return
    except OSError as error:
        raise write_error(target, error) from error
    with (
        reading(source, "a file", "Put it back, then run the same command again.") as file,
        atomic_file(target) as copy,
    ):
        shutil.copyfileobj(file, copy)


def write_error(path: Path, error: OSError) -> ClipcidError:
    """Return the error for a `path` that could not be written."""
    in_place = (errno.ENOTEMPTY, errno.ELOOP)  # the latter of a link, which is not followed
    if isinstance(error, IsADirectoryError | FileExistsError | NotADirectoryError) or error.errno in in_place:
        fix = "Remove or rename what is in its place, then run the same command again."
    elif isinstance(error, FileNotFoundError):
        fix = (
            "Check that its folder exists and that it is not a link to a missing file, then run the same command again."
        )
    elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
        fix = "Allow writing there, or choose another folder."
    else:
        fix = (
            "Free some space or choose another folder, then run the same command again: it continues where it stopped."
        )
    reason = "it is a link, which is not followed" if error.errno == errno.ELOOP else error.strerror or str(error)
    if error.errno is None and " requested and " in reason:  # NumPy counts elements and does not say why
        reason = "the disk is full, or a file size limit is reached"
    return ClipcidError(f"Could not write {path}: {reason}.", fix)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; `shared` as for `atomic_file`."""
    with atomic_file(path, shared) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON; NaN and infinities are refused since JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # JSON's escape too, of a name that is not UTF-8


def write_npy(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an array to `path` in npy form, without pickling."""
    import numpy as np  # a command line that is wrong does not wait for it

    with atomic_file(path) as file:
        np.save(file, array, allow_pickle=False)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table to `path` as parquet (zstd); the same table gives the same bytes."""
    import pyarrow.parquet as pq  # only commands that write parquet wait for it

    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def pack_csv(frame: pd.DataFrame, header: bool = True) -> bytes:
    """Return a frame as comma-separated text without its index, UTF-8."""
    return frame.to_csv(index=False, header=header, lineterminator="\n").encode("utf-8")
