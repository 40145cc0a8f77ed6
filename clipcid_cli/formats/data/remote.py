"""Data behind a URL that fsspec opens, or from a `pipe:` command: read as files whose connections may break."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from clipcid_cli.errors import ClipcidError, TooManyBytesError
from clipcid_cli.formats.data.activity import note_received
from clipcid_cli.formats.data.addresses import CHAIN, command_of, is_chain, is_pipe, is_web, server_of, without_query
from clipcid_cli.formats.files import validate_size
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.shown import redact

# Seconds before each further attempt at a connection that broke. Bytes received start the count anew.
_WAITS = (0.25, 0.5, 1.0, 2.0, 4.0)
# And then, where waiting will help and a run would die: overloaded servers ask for minutes.
_LATER_WAITS = (8.0, 16.0, 32.0, 60.0, 60.0, 120.0)
# Bytes requested at once: a stream waits for the server once per request.
_REQUEST = 2**23
# Errors that another attempt would repeat.
_LASTING = (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError)
_PASSING_STATUSES = {408, 425, 429, *range(500, 600)}  # timeouts, "too many requests", "service unavailable"

# The headers by which servers version a file (HTTP, S3, GCS, Azure, Hugging Face), the surest first.
_VERSIONS = (
    *("etag", "md5hash", "content-md5", "digest", "blob_id", "crc32c"),
    *("lastmodified", "last-modified", "last_modified", "mtime"),
)

# Images of a list that a server failed to send in a row, before the list's others there are left out.
FAILURES = 3
# Seconds for which they are.
SKIP_SECONDS = 60.0

Result = TypeVar("Result")


class ChangedError(ValueError):
    """A file is no longer the version of which parts have been read."""


class NearerNetworkError(ValueError):
    """A server or a list led from its own network into one nearer to this machine."""


class _UnansweredError(ClipcidError):
    """A server did not answer, however often it was asked, or answered that it is overloaded."""


_answered = set[str]()
"""Servers that have answered this process: what breaks there was no wrong address."""


@dataclasses.dataclass
class _Failing:
    """A server that sent none of the last images that a list names there."""

    count: int = 0
    until: float = 0.0  # left out until then


_failing = dict[str, _Failing]()


class RemoteImageError(OSError):
    """An image of a list that could not be fetched."""

    def __init__(self, error: ClipcidError) -> None:
        super().__init__(error.message)
        cause = error.__cause__
        status = _status_of(cause) if isinstance(cause, Exception) else None
        if status is None and isinstance(cause, FileNotFoundError) and cause.__cause__ is None:
            status = 404  # fsspec's error for it
        if isinstance(cause, NearerNetworkError):
            self.answer = f"not asked: {cause}"
        else:
            self.answer = "no answer" if status is None else f"HTTP {status}"
        """What the server said: ``HTTP 403``."""


def open_remote(path: str) -> io.BufferedReader:
    """Open what is behind a URL, or the output of a command, which is run and can only be read in order."""
    return io.BufferedReader(_RemoteStream(path), _REQUEST)


class _RemoteStream(io.RawIOBase):
    """What breaks is opened again where it broke; a command, and a server that sends no parts of files, begins anew."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._place = 0
        self._source: Any = None
        self._version: object = None  # of the file when it was first opened

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not is_pipe(self._path)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go on elsewhere, by another request."""
        if whence == os.SEEK_END:
            offset += describe_file(self._path).size
        elif whence == os.SEEK_CUR:
            offset += self._place
        if offset != self._place:
            self._place = offset
            self._disconnect()
        return offset

    def readinto(self, buffer: Any) -> int:
        data = _retry(self._path, lambda: self._read(len(buffer)))
        self._place += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _read(self, count: int) -> bytes:
        try:
            if self._source is None:
                self._connect()
            data: bytes = self._source.read(count)
            size = getattr(self._source, "size", None)
            if not data and size is not None and self._place < size:
                raise OSError(f"the connection ended at byte {self._place:,}")
            return data
        except Exception:
            self._disconnect()
            raise

    def _connect(self) -> None:
        if is_pipe(self._path):
            self._source = _CommandOutput(self._path)
        else:
            filesystem, inner = _open_filesystem(self._path)
            if is_web(self._path):
                from clipcid_cli.formats.data import web

                self._source = web.WebFile(filesystem, inner, _REQUEST)
            else:
                self._source = filesystem.open(inner, "rb", block_size=_REQUEST, cache_type="none")
            self._validate_version()
        try:
            if self._place:
                self._source.seek(self._place)
        except ValueError:  # a stream: what was read is passed over
            left = self._place
            while left:
                passed = len(self._source.read(min(left, _REQUEST)))
                if not passed:
                    raise OSError(f"it ended before byte {self._place:,}, where it had broken") from None
                left -= passed

    def _validate_version(self) -> None:
        """Refuse a file that is no longer the one of which a part has been read."""
        version = _describe(getattr(self._source, "details", None) or {})
        if self._version not in (None, version):
            raise ChangedError(f"it has changed since its first {self._place:,} bytes were read")
        self._version = version

    def _disconnect(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def close(self) -> None:
        self._disconnect()
        super().close()


class _CommandOutput:
    """What a command writes; its end is an error where the command failed."""

    def __init__(self, path: str) -> None:
        # By the shell, as webdataset does. Only what the user typed comes here: `open_described` refuses commands that a
        # file records, a pattern's names are no patterns again (`shard_files`), a page lists addresses below its own alone
        # (`web.list_links`), and cells of lists, redirects and indexes are read by `fetch_listed` and
        # `ByteRange.read`, which know no commands.
        self._process = subprocess.Popen(command_of(path), shell=True, stdout=subprocess.PIPE, bufsize=0)

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        # A pipe holds no more, and as much as is asked for is allocated.
        data: bytes = self._process.stdout.read(min(size, 2**16))
        if not data and self._process.wait():
            raise OSError(f"exit {self._process.returncode}")
        return data

    def seek(self, _place: int) -> None:
        raise io.UnsupportedOperation("what a command wrote has passed")

    def close(self) -> None:
        with self._process:
            self._process.terminate()


def read_remote(url: str, offset: int, size: int) -> bytes:
    """Read `size` bytes of the file behind a URL by one request; an OSError where it is shorter."""

    def read(filesystem: Any, inner: str) -> bytes:
        if is_web(url):
            from clipcid_cli.formats.data import web

            return web.read_part(filesystem, inner, offset, size)
        data: bytes = filesystem.cat_file(inner, start=offset or None, end=offset + size)
        return data

    data = ask(url, read)
    if len(data) < size:
        raise OSError(f"{url} ends {size - len(data)} bytes early")
    return data


def fetch_listed(url: str, max_bytes: int, listed_in: str | None = None) -> bytes:
    """Read an image of a list, of which some may be missing: its server is not waited for long.

    A TooManyBytesError where it has more than `max_bytes`, of which no more is read.

    Args:
        listed_in: The path or URL of the list, from whose network an image may not lead into a nearer one; None where the
            user typed the address.
    """

    def read(filesystem: Any, inner: str) -> bytes:
        if is_web(url):
            from clipcid_cli.formats.data import web

            with web.named_by(listed_in):
                return web.read_whole(filesystem, inner, max_bytes)
        data: bytes = filesystem.cat_file(inner, end=max_bytes + 1)
        validate_size(url, len(data), max_bytes)
        return data

    server = server_of(url)
    failing = _failing.get(server)
    if failing is not None and failing.count >= FAILURES and time.monotonic() < failing.until:
        raise _failing_error(url)
    try:
        data = ask(url, read, patient=False)
    except _UnansweredError:
        failing = _failing.setdefault(server, _Failing())
        failing.count += 1
        failing.until = time.monotonic() + SKIP_SECONDS
        raise
    except (ClipcidError, TooManyBytesError):
        _failing.pop(server, None)
        raise
    _failing.pop(server, None)
    return data


def _failing_error(url: str) -> ClipcidError:
    return ClipcidError(
        f"{url} is left out: {server_of(url)} did not send the last {FAILURES} images.",
        f"Check the server; it is asked again after {SKIP_SECONDS:g} seconds.",
    )


def describe_file(path: str) -> FileRecord:
    """Return the size of the file behind a URL, and a hash of what its server tells of its content: no byte of it is read.

    That is its size and ETag, checksum or modification time, whichever the server knows. Of a command it is its text,
    without secrets: as the signature of an address, they may differ from run to run.
    """
    size, version = 0, redact(path)
    if not is_pipe(path):
        size, version = _describe(ask(path, lambda filesystem, inner: filesystem.info(inner)))
    digest = hashlib.blake2b(f"{size} {version}".encode("utf-8", "surrogateescape"), digest_size=16)
    return FileRecord(redact(path), size, f"blake2b-remote:{digest.hexdigest()}")


def _describe(info: dict[str, Any]) -> tuple[int, str]:
    """Return the size of a file and the surest of what its server knows of its version."""
    known = {name.lower(): value for name, value in info.items()}
    version = next((str(known[name]) for name in _VERSIONS if known.get(name)), "")
    return int(known.get("size") or 0), version


def list_folder(url: str) -> list[str]:
    """List the addresses of what a folder behind a URL holds."""

    def list_names(filesystem: Any, inner: str) -> list[str]:
        if is_web(url):
            from clipcid_cli.formats.data import web

            return web.list_links(filesystem, inner)
        return [str(filesystem.unstrip_protocol(name)) for name in filesystem.ls(inner, detail=False)]

    try:
        return ask(url, list_names)
    except TooManyBytesError as error:
        raise ClipcidError(
            f"{url} cannot be listed as a folder: {error}.", "Name its shards by a pattern: …/{00000..00099}.tar"
        ) from error


@contextlib.contextmanager
def temporary_copy(path: str) -> Iterator[Path]:
    """Give a file of this disk with the content behind a URL or of a command; it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="clipcid-") as folder:
        copy = Path(folder, "copy" + Path(without_query(path)).suffix)
        most = shutil.disk_usage(folder).free * 9 // 10
        with copy.open("wb") as file, open_remote(path) as source:
            while piece := source.read(_REQUEST):
                file.write(piece)
                if file.tell() > most:
                    raise ClipcidError(
                        f"{path} has more than {most:,} bytes, nine tenths of what is free in {tempfile.gettempdir()}.",
                        "Download it, and give the local file; or name a larger disk by TMPDIR.",
                    )
        yield copy


def _open_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path within it."""
    if is_chain(url):
        raise ClipcidError(
            f"{url} holds {CHAIN}, by which file systems are read one through the other.",
            "Give the address of a file, or copy the data to a local folder.",
        )
    more = dict[str, Any]()
    if is_web(url):
        from clipcid_cli.formats.data import web

        more["get_client"] = web.make_session
    try:
        return fsspec.core.url_to_fs(url, **more)  # type: ignore[no-any-return]  # fsspec has no types
    except (ImportError, ValueError) as error:
        raise ClipcidError(
            f"{url} cannot be opened: {error}",
            "Install the package that fsspec asks for, or copy the data to a local folder.",
        ) from error


def expect_answers(url: str) -> None:
    """Be patient with the server of a URL: another process has heard from it."""
    _answered.add(server_of(url))


def ask(url: str, question: Callable[[Any, str], Result], patient: bool = True, done: str = "fetched") -> Result:
    """Ask the file system of a URL about the path within it; again where the connection breaks.

    Args:
        done: What cannot be done to it then, for the error.
    """
    return _retry(url, lambda: question(*_open_filesystem(url)), patient, done)


def _retry(path: str, attempt: Callable[[], Result], patient: bool = True, done: str = "fetched") -> Result:
    """Return what `attempt` does, tried again after each of `_WAITS`.

    With `patient` also after `_LATER_WAITS`, where the server says that it is overloaded or has answered before; without,
    not where it has been waited for in vain. A command has its own way to wait, and does not say why it failed.
    """
    for attempts in itertools.count(1):
        try:
            result = attempt()
        except (ClipcidError, TooManyBytesError):
            raise
        except Exception as error:  # every fsspec backend raises its client's own errors
            status = _status_of(error)
            waits: tuple[float, ...] = _WAITS
            if patient and not is_pipe(path) and (status in _PASSING_STATUSES or server_of(path) in _answered):
                waits += _LATER_WAITS
            note_received()
            if _is_lasting(error, status):
                raise _fetch_error(path, error, attempts, done) from error
            if attempts > len(waits) or (not patient and isinstance(error, TimeoutError)):
                raise _fetch_error(path, error, attempts, done, _UnansweredError) from error
            time.sleep(waits[attempts - 1])
        else:
            note_received()
            _answered.add(server_of(path))
            return result
    raise AssertionError("the last attempt returns or raises")


def _status_of(error: Exception) -> int | None:
    cause = error.__cause__ or error
    status = getattr(cause, "status", None)
    response = getattr(cause, "response", None)
    if status is None and isinstance(response, dict):  # of S3's client
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _is_lasting(error: Exception, status: int | None) -> bool:
    if status is not None:
        return 400 <= status < 500 and status not in _PASSING_STATUSES
    # HTTP servers that do not answer count as "not found" with fsspec.
    return isinstance(error.__cause__ or error, _LASTING)


def _fetch_error(
    path: str, error: Exception, attempts: int, done: str, kind: type[ClipcidError] = ClipcidError
) -> ClipcidError:
    reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    again = f" (tried {attempts} times)" if attempts > 1 else ""
    if is_pipe(path):
        return ClipcidError(
            f"The command {path} failed{again}: {reason[:300]}.",
            "Run what follows `pipe:` in a shell to see why.",
        )
    if isinstance(error, ChangedError):
        return ClipcidError(
            f"{path} was replaced while it was read: {reason}.",
            "Run the same command again once nothing writes to it.",
        )
    return kind(
        f"{path} could not be {done}{again}: {reason[:300]}", "Check the address, the network and the credentials."
    )
