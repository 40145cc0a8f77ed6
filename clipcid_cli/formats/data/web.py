"""Files behind http and https addresses: in one version, within a time and a size.

No redirect and no list leads a request into a network that is nearer to this machine than where it came from.
"""

from __future__ import annotations

import asyncio
import contextvars
import html
import ipaddress
import math
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import lru_cache
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import fsspec.asyn

from clipcid_cli.formats.data.addresses import WEB_SCHEMES, is_remote
from clipcid_cli.formats.data.remote import ChangedError, NearerNetworkError
from clipcid_cli.formats.files import validate_size

CONNECT_SECONDS = 10.0
"""Longest wait for a server to accept a connection."""
IDLE_SECONDS = 30.0
"""Longest wait for the next bytes of an answer."""
FILE_SECONDS = 300.0
"""Longest time for one image of a list."""

_SKIPPED = 2**20  # bytes at a time that are passed over
_LARGEST_PAGE = 2**24  # bytes of a page that lists a folder
_LINK = re.compile(r"<a\s[^<>]*?href=[\"']([^\"'<>]+)", re.IGNORECASE)  # no stretch of a page is tried twice
_RANGE = re.compile(r"bytes (\d+)-")
_VERSIONS = ("ETag", "Last-Modified")


class Network(IntEnum):
    """Where a server is; a larger one is nearer to this machine, and what is asked there is trusted more."""

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    LINK_LOCAL = 3  # where clouds hand out credentials


_CALLED = {
    Network.PUBLIC: "a public address",
    Network.PRIVATE: "a private address",
    Network.LOOPBACK: "this machine",
    Network.LINK_LOCAL: "a link-local address",
}

# The network of the list that names what is asked for; None where the user does.
_named_from: contextvars.ContextVar[Network | None] = contextvars.ContextVar("_named_from", default=None)
# The outermost network that had a part in where this task's request goes next.
_sent_from: contextvars.ContextVar[Network | None] = contextvars.ContextVar("_sent_from", default=None)

_ADDRESS_SECONDS = 60.0  # for which the addresses of a name are remembered
_NAMES = 1000  # of which they are


def network_of(address: str) -> Network:
    """Tell in which network an IP address is."""
    parsed: Any = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    if inner is not None:
        parsed = inner
    if parsed.is_link_local:
        return Network.LINK_LOCAL
    if parsed.is_loopback or parsed.is_unspecified:
        return Network.LOOPBACK
    return Network.PUBLIC if parsed.is_global and not parsed.is_multicast else Network.PRIVATE


@lru_cache(maxsize=1024)
def network_of_list(source: str) -> Network:
    """Tell in which network a list is: one on this disk is on this machine.

    The server of one that cannot be looked up, or is a cloud's, is in the public network.
    """
    if not is_remote(source):
        return Network.LOOPBACK
    parts = urlsplit(source)
    if parts.scheme.lower() not in WEB_SCHEMES or parts.hostname is None:
        return Network.PUBLIC
    try:
        addresses = socket.getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return Network.PUBLIC
    return min(network_of(str(address[0])) for *_, address in addresses)


def validate_hop(source: Network, address: str) -> None:
    """Refuse a way from one network to an IP address that is nearer to this machine."""
    network = network_of(address)
    if network > source:
        there = _CALLED[network]
        raise NearerNetworkError(f"it leads from {_CALLED[source]} to {address}, which is {there}")


@contextmanager
def named_by(source: str | None) -> Iterator[None]:
    """Hold the requests inside the block to be named by the list at a path or URL; None where the user named them."""
    token = _named_from.set(None if source is None else network_of_list(source))
    try:
        yield
    finally:
        _named_from.reset(token)


class _Connector(aiohttp.TCPConnector):
    """Looks at the address of each request of a chain of redirects before and after it is connected."""

    def __init__(self) -> None:
        super().__init__()
        self._addresses = dict[str, tuple[float, list[str]]]()

    async def connect(self, req: Any, *args: Any, **more: Any) -> Any:
        source = _sent_from.get()
        if source is not None and (source < Network.LOOPBACK or _is_ip_address(req.url.host)):
            # Not of names in a list on this disk, which would all be looked up twice: few lead to a link-local address, and
            # of those nothing is asked once they are connected.
            await self._validate(source, req.url)
        connection = await super().connect(req, *args, **more)
        transport = None if req.proxy else connection.transport  # a proxy decides where it connects to
        peer = None if transport is None else transport.get_extra_info("peername")
        if peer is None:
            return connection
        if source is not None:
            try:  # a name may have got another address since it was looked up
                validate_hop(source, peer[0])
            except NearerNetworkError:
                connection.close()
                raise
        here = network_of(peer[0])
        _sent_from.set(here if source is None else min(source, here))
        return connection

    async def _validate(self, source: Network, url: Any) -> None:
        now = time.monotonic()
        known, addresses = self._addresses.get(url.host, (-math.inf, []))
        if now - known > _ADDRESS_SECONDS:
            try:
                answers = await asyncio.get_running_loop().getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
            except OSError:
                return  # connecting says so
            addresses = [str(address[0]) for *_, address in answers]
            if len(self._addresses) >= _NAMES:
                self._addresses.clear()
            self._addresses[url.host] = now, addresses
        for address in addresses:
            validate_hop(source, address)


def _is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


async def _begin_chain(*_: object) -> None:
    """Forget where an earlier request of this task was sent."""
    _sent_from.set(_named_from.get())


async def make_session(headers: dict[str, str] | None = None, **options: Any) -> aiohttp.ClientSession:
    """Make the session of fsspec's file system for http; `options` are those that it, or the user's configuration, sets."""
    tracing = aiohttp.TraceConfig()
    tracing.on_request_start.append(_begin_chain)
    own: dict[str, Any] = {"connector": _Connector(), "timeout": _timeout(FILE_SECONDS), "trace_configs": [tracing]}
    return aiohttp.ClientSession(headers={"Accept-Encoding": "identity"} | (headers or {}), **own | options)


def _timeout(total: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total, CONNECT_SECONDS, IDLE_SECONDS)


def read_whole(filesystem: Any, url: str, max_bytes: int) -> bytes:
    """Read a file by one request; a TooManyBytesError where it has more than `max_bytes`, of which no more is read."""
    data: bytes = fsspec.asyn.sync(filesystem.loop, _read_whole, filesystem, url, max_bytes)
    return data


async def _read_whole(filesystem: Any, url: str, max_bytes: int) -> bytes:
    async with await _ask(filesystem, url, {}, _timeout(FILE_SECONDS)) as response:
        response.raise_for_status()
        validate_size(url, response.content_length or 0, max_bytes)
        data = bytearray()
        async for piece in response.content.iter_any():
            data += piece
            validate_size(url, len(data), max_bytes)
        return bytes(data)


def list_links(filesystem: Any, url: str) -> list[str]:
    """List the addresses below a page's own that it names; a TooManyBytesError where it is larger than a page of names."""
    page = read_whole(filesystem, url, _LARGEST_PAGE).decode("utf-8", "replace")
    folder = url if url.endswith("/") else f"{url}/"
    named = (urljoin(folder, html.unescape(link)) for link in _LINK.findall(page))
    return list(dict.fromkeys(address for address in named if address.startswith(folder)))


def read_part(filesystem: Any, url: str, offset: int, size: int) -> bytes:
    """Read `size` bytes of a file by one request, fewer at its end."""
    data: bytes = fsspec.asyn.sync(filesystem.loop, _read_part, filesystem, url, offset, size)
    return data


async def _read_part(filesystem: Any, url: str, offset: int, size: int) -> bytes:
    headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
    async with await _ask(filesystem, url, headers, _timeout(FILE_SECONDS)) as response:
        response.raise_for_status()
        await _begin_at(response, offset)
        return await _take(response, size)


class WebFile:
    """A file that is read in order from any place, by a request for each part, all of the version there was at first."""

    def __init__(self, filesystem: Any, url: str, part_bytes: int) -> None:
        """Ask for size and version.

        Args:
            part_bytes: What is asked for at once, of a server that sends parts of files.
        """
        self._filesystem = filesystem
        self._url = url
        self._part_bytes = part_bytes
        self.details: dict[str, Any] = filesystem.info(url)
        self.size: int | None = self.details.get("size")
        self._sends_parts = self.size is not None and self.details.get("partial", True)
        self._versioned_by = next((name for name in _VERSIONS if self.details.get(name)), "")
        self._place = 0
        self._response: aiohttp.ClientResponse | None = None

    def seek(self, place: int) -> None:
        self._close()
        self._place = place

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes; none at the end."""
        data: bytes = fsspec.asyn.sync(self._filesystem.loop, self._read, count)
        return data

    async def _read(self, count: int) -> bytes:
        if self.size is not None:
            count = min(count, self.size - self._place)
            if count <= 0:
                return b""
        data = b""
        is_new = False
        while not data and not is_new:  # else the last part had just ended
            is_new = self._response is None
            response = self._response = self._response or await self._request()
            is_whole = is_new and response.status == 206 and (response.content_length or math.inf) <= count
            data = await (response.read() if is_whole else _take(response, count))  # the former is faster
            if len(data) < count or response.content.at_eof():
                response.release()
                self._response = None
        self._place += len(data)
        return data

    async def _request(self) -> aiohttp.ClientResponse:
        headers = dict[str, str]()
        if self._sends_parts:
            assert self.size is not None, "known of a server that sends parts"
            headers["Range"] = f"bytes={self._place}-{min(self._place + self._part_bytes, self.size) - 1}"
        name = self._versioned_by
        version = str(self.details.get(name, ""))
        if name == "ETag" and version.startswith('"'):  # a weak one never matches
            headers["If-Match"] = version
        response = await _ask(self._filesystem, self._url, headers, _timeout(None))
        try:
            there = response.headers.get(name)
            if response.status == 412 or (there and there.removeprefix("W/") != version.removeprefix("W/")):
                raise ChangedError(f"it has changed since its first {self._place:,} bytes were read")
            response.raise_for_status()
            await _begin_at(response, self._place)
        except BaseException:
            response.close()
            raise
        return response

    def close(self) -> None:
        self._close()

    def _close(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            self._filesystem.loop.call_soon_threadsafe(response.close)


async def _ask(
    filesystem: Any, url: str, headers: dict[str, str], timeout: aiohttp.ClientTimeout
) -> aiohttp.ClientResponse:
    """Return the answer to a request; a FileNotFoundError where there is no such file."""
    session = await filesystem.set_session()
    response: aiohttp.ClientResponse = await session.get(filesystem.encode_url(url), headers=headers, timeout=timeout)
    if response.status == 404:
        response.close()
        raise FileNotFoundError(url)
    return response


async def _begin_at(response: aiohttp.ClientResponse, place: int) -> None:
    """Pass over what is before `place` in an answer: all of the file's beginning where its server sends no parts."""
    sent = _RANGE.match(response.headers.get("Content-Range", "")) if response.status == 206 else None
    start = 0 if response.status != 206 else place if sent is None else int(sent[1])
    if start > place:
        raise OSError(f"the server sent bytes from {start:,} in place of {place:,}")
    left = place - start
    while left:
        passed = len(await response.content.read(min(left, _SKIPPED)))
        if not passed:
            raise OSError(f"it ended before byte {place:,}")
        left -= passed


async def _take(response: aiohttp.ClientResponse, count: int) -> bytes:
    """Take the next `count` bytes of an answer, fewer at its end."""
    pieces = list[bytes]()
    left = count
    while left and (piece := await response.content.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
