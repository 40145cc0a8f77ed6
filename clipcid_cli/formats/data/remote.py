"""Data behind a URL that fsspec opens, or from a `pipe:` command: read as files whose connections may break."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from clipcid_cli.errors import ClipcidError

_PIPE = "pipe:"
# Seconds before each further attempt at a connection that broke. Bytes received start the count anew.
_WAITS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Bytes requested at once: a stream waits for the server once per request.
_REQUEST = 2**23
_COPY = 2**22
# Errors that another attempt would repeat.
_LASTING = (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError)
_LASTING_STATUSES = set(range(400, 500)) - {408, 425, 429}  # timeouts and "too many requests" pass

# What servers call that which changes with a file's content (HTTP, S3, GCS, Azure, Hugging Face), the surest first.
_VERSIONS = (
    *("etag", "md5hash", "content-md5", "digest", "blob_id", "crc32c"),
    *("lastmodified", "last-modified", "last_modified", "mtime"),
)

Result = TypeVar("Result")


def is_url(spec: str) -> bool:
    """Tell a URL from a local path."""
    return re.match(r"[A-Za-z][\w+.-]*://", spec) is not None


def is_pipe(spec: str) -> bool:
    """Tell whether this is a ``pipe:`` command, whose output is a tar."""
    return spec.startswith(_PIPE)


def is_remote(spec: str) -> bool:
    """Tell whether this is read as a stream: a URL or a command."""
    return is_url(spec) or is_pipe(spec)


class RemoteFile(io.RawIOBase):
    """The bytes behind a URL, or the output of a command.

    A connection that breaks is opened again where it broke, after a pause. Servers that send no ranges, and commands, then
    start over, and what was read before is passed over, as what lies before a place that is sought.

    Attributes:
        size: Number of bytes, known from the first read on; None where the server or a command does not tell.
    """

    def __init__(self, path: str) -> None:
        self.size: int | None = None
        self._path, self._in_ranges = path, not is_pipe(path)
        self._file: Any = None
        self._place = self._wanted = 0  # of the connection, and where the next byte is to come from

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True; but of a command's output only what is to come is near."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Choose where the next byte comes from, by its offset from the first or from the next byte."""
        self._wanted = offset + (self._wanted if whence == io.SEEK_CUR else 0)
        return self._wanted

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._wanted

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; none at the end alone."""
        part = _retry(self._path, partial(self._read_once, len(buffer)), self._disconnect)
        buffer[: len(part)] = part
        return len(part)

    def drain(self) -> None:
        """Take what is left of a command's output, and learn whether the command failed."""
        while is_pipe(self._path) and self.read(_COPY):
            pass

    def close(self) -> None:
        """Close the connection, or end the command."""
        self._disconnect()
        super().close()

    def _disconnect(self) -> None:
        file, self._file = self._file, None
        with contextlib.suppress(Exception):  # what a broken connection or an ended command says of itself
            if isinstance(file, subprocess.Popen):
                file.terminate()
                file.communicate()
            elif file is not None:
                file.close()

    def _read_once(self, size: int) -> bytes:
        if self._file is not None and self._wanted < self._place and not self._in_ranges:
            self._disconnect()
        if self._file is None:
            self._connect()
        if self._in_ranges and self._place != self._wanted:
            self._file.seek(self._wanted)
            self._place = self._wanted
        while self._place < self._wanted and self._take(min(self._wanted - self._place, _COPY)):
            pass
        data = self._take(size)
        self._wanted += len(data)
        return data

    def _connect(self) -> None:
        self._place = 0
        if is_pipe(self._path):
            # By the shell, as webdataset does.
            self._file = subprocess.Popen(self._path.removeprefix(_PIPE), shell=True, stdout=subprocess.PIPE)
            return
        filesystem, inner = open_filesystem(self._path)
        options = {"block_size": _REQUEST, "cache_type": "readahead"} if self._in_ranges else {"block_size": 0}
        self._file = filesystem.open(inner, "rb", **options)
        self.size = getattr(self._file, "size", None)

    def _take(self, size: int) -> bytes:
        """Read on where the connection is."""
        command = isinstance(self._file, subprocess.Popen)
        try:
            data: bytes = (self._file.stdout if command else self._file).read(size)
        except ValueError as error:  # the server answers a request for a part with the whole
            self._in_ranges = False
            raise OSError(str(error)) from None
        self._place += len(data)
        if not data and command and self._file.wait():
            raise OSError(f"exit {self._file.returncode}")
        if not data and self.size is not None and self._place < self.size:
            raise OSError(f"the connection ended at byte {self._place:,} of {self.size:,}")
        return data


def open_remote(path: str) -> io.BufferedReader:
    """Open the bytes behind a URL, or the output of a command, which is run."""
    return io.BufferedReader(RemoteFile(path), 2**17)


def read_remote(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read `size` bytes of the file behind a URL, or all of it, by one request.

    Raises:
        OSError: when it is shorter.
    """

    def fetch() -> bytes:
        filesystem, inner = open_filesystem(url)
        data: bytes = filesystem.cat_file(inner, offset, None if size is None else offset + size)
        if size is not None and len(data) > size:  # the server sends no ranges
            data = data[offset : offset + size]
        return data

    data = _retry(url, fetch)
    if size is not None and len(data) != size:
        raise OSError(f"{url} ends {size - len(data)} bytes early")
    return data


def describe_file(path: str) -> dict[str, Any]:
    """Return the size of the file behind a URL, and a hash of what its server tells of its content: no byte of it is read.

    That is its size and ETag, checksum or modification time, whichever the server knows. Of a command it is its text.

    Returns:
        ``path``, ``size``, ``hash``.
    """
    if is_pipe(path):
        return {"path": path, "size": 0, "hash": _hash_version(0, path)}

    def fetch() -> dict[str, Any]:
        filesystem, inner = open_filesystem(path)
        return {name.lower(): value for name, value in filesystem.info(inner).items()}

    known = _retry(path, fetch)
    size = int(known.get("size") or 0)
    version = next((str(known[name]) for name in _VERSIONS if known.get(name)), "")
    return {"path": path, "size": size, "hash": _hash_version(size, version)}


def tells_content(described: dict[str, Any]) -> bool:
    """Tell whether the hash of `describe_file` changes with the content: neither a command's does, nor a bare size's."""
    return not is_pipe(described["path"]) and described["hash"] != _hash_version(described["size"], "")


def _hash_version(size: int, version: str) -> str:
    digest = hashlib.blake2b(f"{size} {version}".encode("utf-8", "surrogateescape"), digest_size=16)
    return f"blake2b-remote:{digest.hexdigest()}"


def list_folder(url: str) -> list[str]:
    """List the addresses of what a folder behind a URL holds."""

    def fetch() -> list[str]:
        filesystem, inner = open_filesystem(url)
        return [str(filesystem.unstrip_protocol(name)) for name in filesystem.ls(inner, detail=False)]

    return _retry(url, fetch)


def download(path: str, file: IO[bytes]) -> None:
    """Write the bytes behind a URL, or a command's output, to a file."""
    with open_remote(path) as stream:
        shutil.copyfileobj(stream, file, _COPY)


@contextlib.contextmanager
def local_file(path: str) -> Iterator[Path]:
    """Give a local path with the content of `path`; what is behind a URL or a command is a copy, removed afterwards."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="clipcid-") as folder:
        copy = Path(folder, "copy" + Path(path).suffix)
        with copy.open("wb") as file:
            download(path, file)
        yield copy


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path within it."""
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]  # fsspec has no types
    except (ImportError, ValueError) as error:
        raise ClipcidError(
            f"{url} cannot be opened: {error}",
            "Install the package that fsspec asks for, or copy the data to a local folder.",
        ) from error


def _retry(path: str, attempt: Callable[[], Result], reset: Callable[[], None] = lambda: None) -> Result:
    """Return what `attempt` does, tried again after each of `_WAITS`; `reset` is called after an attempt that failed."""
    for wait in (*_WAITS, None):
        try:
            return attempt()
        except ClipcidError:
            raise
        except Exception as error:  # every fsspec backend raises its client's own errors
            reset()
            if wait is None or _is_lasting(error):
                raise _fetch_error(path, error, 0 if wait is not None else len(_WAITS)) from error
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _is_lasting(error: Exception) -> bool:
    cause = error.__cause__ or error  # HTTP servers that do not answer count as "not found" with fsspec
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status in _LASTING_STATUSES
    return isinstance(cause, _LASTING)


def _fetch_error(path: str, error: Exception, retries: int) -> ClipcidError:
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    again = f" (tried {retries + 1} times)" if retries else ""
    if is_pipe(path):
        return ClipcidError(
            f"The command {path} failed{again}: {reason[:300]}.",
            "Run what follows `pipe:` in a shell to see why.",
        )
    return ClipcidError(
        f"{path} could not be fetched{again}: {reason[:300]}", "Check the address, the network and the credentials."
    )
