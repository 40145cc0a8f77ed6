"""Data behind a URL that fsspec opens, or from a `pipe:` command: read as files whose connections may break."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import FileRecord

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


def read_blocks(path: str) -> Generator[bytes]:
    """Yield the bytes behind a URL, or the output of a command, which is run, in order.

    What breaks is tried again: of a URL the request of `_REQUEST` bytes; of a command all, and what was read is passed over.
    """
    if is_pipe(path):
        yield from _run(path)
        return
    size, place = _read_info(path).get("size"), 0
    while size is None or place < size:
        end = place + _REQUEST if size is None else min(place + _REQUEST, int(size))
        data = _fetch(path, place, end, is_whole=size is not None)
        whole = len(data) > end - place  # the server sends no ranges
        if data:
            yield data[place:] if whole else data
        if whole or len(data) < end - place:
            return
        place = end


def _run(command: str) -> Iterator[bytes]:
    """Yield what a command writes, until it has ended well."""
    place, waits = 0, iter(_WAITS)
    while True:
        # By the shell, as webdataset does.
        with subprocess.Popen(command.removeprefix(_PIPE), shell=True, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                left = place
                while data := process.stdout.read(_COPY):
                    passed = min(left, len(data))
                    left -= passed
                    if passed < len(data):
                        place, waits = place + len(data) - passed, iter(_WAITS)
                        yield data[passed:]
                if not process.wait():
                    return
            finally:
                process.terminate()
        wait = next(waits, None)
        if wait is None:
            raise _fetch_error(command, OSError(f"exit {process.returncode}"), len(_WAITS))
        time.sleep(wait)


class RemoteStream(io.RawIOBase):
    """What `read_blocks` yields, as a file that is read once."""

    def __init__(self, path: str) -> None:
        self._blocks, self._held = read_blocks(path), memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; none at the end alone."""
        if not self._held:
            self._held = memoryview(next(self._blocks, b""))
        part = self._held[: len(buffer)]
        self._held = self._held[len(part) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Close the connection, or end the command."""
        self._blocks.close()
        super().close()


def read_remote(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """Read `size` bytes of the file behind a URL, or all of it, by one request.

    Raises:
        OSError: when it is shorter.
    """
    end = None if size is None else offset + size
    data = _fetch(url, offset, end)
    if end is not None and len(data) > end - offset:  # the server sends no ranges
        data = data[offset:end]
    if size is not None and len(data) < size:
        raise OSError(f"{url} ends {size - len(data)} bytes early")
    return data


def _fetch(url: str, start: int, end: int | None, *, is_whole: bool = False) -> bytes:
    """Read a part of the file behind a URL; all of it where the server sends no ranges.

    Args:
        is_whole: Whether the file is known to hold all of the part.
    """

    def fetch() -> bytes:
        filesystem, inner = open_filesystem(url)
        data: bytes = filesystem.cat_file(inner, start or None, end)
        if is_whole and end is not None and len(data) < end - start:
            raise OSError(f"the connection ended at byte {start + len(data):,}")
        return data

    return _retry(url, fetch)


def describe_file(path: str) -> FileRecord:
    """Return the size of the file behind a URL, and a hash of what its server tells of its content: no byte of it is read.

    That is its size and ETag, checksum or modification time, whichever the server knows. Of a command it is its text.
    """
    if is_pipe(path):
        return FileRecord(path, 0, _hash_version(0, path))

    known = {name.lower(): value for name, value in _read_info(path).items()}
    size = int(known.get("size") or 0)
    version = next((str(known[name]) for name in _VERSIONS if known.get(name)), "")
    return FileRecord(path, size, _hash_version(size, version))


def _read_info(url: str) -> dict[str, Any]:
    def fetch() -> dict[str, Any]:
        filesystem, inner = open_filesystem(url)
        info: dict[str, Any] = filesystem.info(inner)
        return info

    return _retry(url, fetch)


def tells_content(described: FileRecord) -> bool:
    """Tell whether the hash of `describe_file` changes with the content: neither a command's does, nor a bare size's."""
    return not is_pipe(described.path) and described.hash != _hash_version(described.size, "")


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
    for block in read_blocks(path):
        file.write(block)


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


def _retry(path: str, attempt: Callable[[], Result]) -> Result:
    """Return what `attempt` does, tried again after each of `_WAITS`."""
    for wait in (*_WAITS, None):
        try:
            return attempt()
        except ClipcidError:
            raise
        except Exception as error:  # every fsspec backend raises its client's own errors
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
