"""Data behind a URL that fsspec opens, or from a `pipe:` command: streams and ranges that survive broken connections."""

from __future__ import annotations

import contextlib
import hashlib
import re
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


class RemoteStream:
    """The bytes behind a URL, or the output of a command, in order.

    A connection that breaks is opened again where it broke, after a pause. Servers that send no ranges, and commands, then
    start over, and what was read before is skipped.

    Attributes:
        end: Number of bytes, known from the first read on; None where the server or a command does not tell.
    """

    def __init__(self, path: str) -> None:
        self._path, self._position = path, 0
        self._file: Any = None
        self._in_ranges = True
        self.end: int | None = None

    def __enter__(self) -> RemoteStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, size: int) -> bytes:
        """Read the next `size` bytes; fewer only at the end.

        Raises:
            ClipcidError: when the connection breaks again and again, or there is no such file.
        """
        parts = []
        while size > 0:
            part = _retry(self._path, partial(self._read_once, size), self.close)
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_at(self, offset: int, size: int) -> bytes:
        """Read `size` bytes further on; those in between are passed over.

        Raises:
            ClipcidError: also when the stream ends in between.
        """
        while self._position < offset:
            if not self.read(min(offset - self._position, _COPY)):
                raise ClipcidError(
                    f"{self._path} is truncated: it ends at byte {self._position:,}, within a member.",
                    "Make it again, or remove it from the data.",
                )
        return self.read(size)

    def content(self, offset: int, size: int) -> bytes | None:
        """Read what a member of a tar holds: a stream does not come back to it."""
        return self.read_at(offset, size)

    def finish(self) -> None:
        """Take what is left of a command's output, and learn whether the command failed.

        Raises:
            ClipcidError: when it did.
        """
        if is_pipe(self._path):
            while self.read(_COPY):
                pass

    def close(self) -> None:
        """Close the connection, or end the command."""
        file, self._file = self._file, None
        if file is None:
            return
        if is_pipe(self._path):
            file.proc.terminate()
        with contextlib.suppress(Exception):  # what a broken connection or an ended command says of itself
            file.close()

    def _read_once(self, size: int) -> bytes:
        if self._file is None:
            self._open()
        try:
            data: bytes = self._file.read(size)
        except ValueError as error:  # the server answers a request for a part with the whole
            self._in_ranges = False
            raise OSError(str(error)) from None
        self._position += len(data)
        if not data and size:
            if is_pipe(self._path):
                self._file.wait_for_child()  # raises when the command failed
            elif self.end is not None and self._position < self.end:
                raise OSError(f"the connection ended at byte {self._position:,} of {self.end:,}")
        return data

    def _open(self) -> None:
        if is_pipe(self._path):
            from webdataset.gopen import gopen  # 0.2 s, which only commands cost

            file = gopen(self._path, "rb")
        else:
            filesystem, inner = open_filesystem(self._path)
            options = {"block_size": _REQUEST, "cache_type": "readahead"} if self._in_ranges else {"block_size": 0}
            file = filesystem.open(inner, "rb", **options)
            self.end = getattr(file, "size", None)
        self._file = file
        if self._position and self._in_ranges and not is_pipe(self._path):
            file.seek(self._position)
            return
        left = self._position
        while left and (part := file.read(min(left, _COPY))):
            left -= len(part)


def read_range(url: str, offset: int, size: int) -> bytes:
    """Read `size` bytes of the file behind a URL.

    Raises:
        ClipcidError: when it cannot be fetched.
        OSError: when it is shorter.
    """

    def fetch() -> bytes:
        filesystem, inner = open_filesystem(url)
        data: bytes = filesystem.cat_file(inner, offset, offset + size)
        if len(data) > size:  # the server sends no ranges
            data = data[offset : offset + size]
        return data

    data = _retry(url, fetch)
    if len(data) != size:
        raise OSError(f"{url} ends {size - len(data)} bytes early")
    return data


def read_whole(url: str) -> bytes:
    """Read the whole file behind a URL.

    Raises:
        OSError: when it cannot be fetched.
    """

    def fetch() -> bytes:
        filesystem, inner = open_filesystem(url)
        data: bytes = filesystem.cat_file(inner)
        return data

    try:
        return _retry(url, fetch)
    except ClipcidError as error:
        raise OSError(error.message) from error


def describe_file(path: str) -> dict[str, Any]:
    """Return the size of the file behind a URL, and a hash of what its server tells of its content: no byte of it is read.

    That is its size and ETag, checksum or modification time, whichever the server knows. Of a command it is its text.

    Returns:
        ``path``, ``size``, ``hash``.

    Raises:
        ClipcidError: when there is no such file, or its server does not answer.
    """
    if is_pipe(path):
        size, version = 0, path
    else:
        known = {name.lower(): value for name, value in _retry(path, partial(_read_info, path)).items()}
        size = int(known.get("size") or 0)
        version = next((str(known[name]) for name in _VERSIONS if known.get(name)), "")
    return {"path": path, "size": size, "hash": _hash_version(size, version)}


def tells_content(described: dict[str, Any]) -> bool:
    """Tell whether the hash of `describe_file` changes with the content: neither a command's does, nor a bare size's."""
    return not is_pipe(described["path"]) and described["hash"] != _hash_version(described["size"], "")


def _hash_version(size: int, version: str) -> str:
    digest = hashlib.blake2b(f"{size} {version}".encode("utf-8", "surrogateescape"), digest_size=16)
    return f"blake2b-remote:{digest.hexdigest()}"


def _read_info(url: str) -> dict[str, Any]:
    filesystem, inner = open_filesystem(url)
    info: dict[str, Any] = filesystem.info(inner)
    return info


def list_folder(url: str) -> list[str]:
    """List the addresses of what a folder behind a URL holds.

    Raises:
        ClipcidError: when there is no such folder, or its server does not answer.
    """

    def fetch() -> list[str]:
        filesystem, inner = open_filesystem(url)
        return [str(filesystem.unstrip_protocol(name)) for name in filesystem.ls(inner, detail=False)]

    return _retry(url, fetch)


def download(path: str, file: IO[bytes]) -> None:
    """Write the bytes behind a URL, or a command's output, to a file.

    Raises:
        ClipcidError: when it cannot be fetched.
    """
    with RemoteStream(path) as stream:
        while part := stream.read(_COPY):
            file.write(part)


@contextlib.contextmanager
def local_file(path: str) -> Iterator[Path]:
    """Give a local path with the content of `path`; what is behind a URL or a command is a copy, removed afterwards.

    Raises:
        ClipcidError: when it cannot be fetched.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="clipcid-") as folder:
        copy = Path(folder, "copy" + Path(path).suffix)
        with copy.open("wb") as file:
            download(path, file)
        yield copy


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path within it.

    Raises:
        ClipcidError: when fsspec has no such protocol, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]  # fsspec has no types
    except (ImportError, ValueError) as error:
        raise ClipcidError(
            f"{url} cannot be opened: {error}",
            "Install the package that fsspec asks for, or copy the data to a local folder.",
        ) from error


def _retry(path: str, attempt: Callable[[], Result], reset: Callable[[], None] = lambda: None) -> Result:
    """Return what `attempt` does, tried again after each of `_WAITS`.

    Args:
        reset: Called after an attempt that failed.

    Raises:
        ClipcidError: naming `path` and what its server or command said last.
    """
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
        found = re.search(r"\): (exit -?\d+)", reason)
        return ClipcidError(
            f"The command {path} failed{again}: {found[1] if found else reason[:300]}.",
            "Run what follows `pipe:` in a shell to see why.",
        )
    return ClipcidError(
        f"{path} could not be fetched{again}: {reason[:300]}", "Check the address, the network and the credentials."
    )
