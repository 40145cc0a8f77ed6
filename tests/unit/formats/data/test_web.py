"""Servers that lie, lead elsewhere, never end or never answer."""

from __future__ import annotations

import gzip
import http.server
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_server import send, serve, serve_answers

from clipcid_cli.errors import ClipcidError, TooManyBytesError
from clipcid_cli.formats.data import remote, web
from clipcid_cli.formats.data.cells import origin_of_list
from clipcid_cli.formats.data.remote import NearerNetworkError, fetch_listed, open_remote
from clipcid_cli.formats.data.samples import ByteRange
from clipcid_cli.formats.data.web import Network, network_of, network_of_list, validate_hop

Request = http.server.BaseHTTPRequestHandler
LIMIT = 10_000


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("93.184.216.34", Network.PUBLIC),
        ("2606:2800:220:1::1", Network.PUBLIC),
        ("10.1.2.3", Network.PRIVATE),
        ("192.168.1.1", Network.PRIVATE),
        ("100.64.0.1", Network.PRIVATE),
        ("fd00:ec2::254", Network.PRIVATE),
        ("127.0.0.1", Network.LOOPBACK),
        ("0.0.0.0", Network.LOOPBACK),
        ("::1", Network.LOOPBACK),
        ("::ffff:127.0.0.1", Network.LOOPBACK),
        ("2002:7f00:1::", Network.LOOPBACK),
        ("169.254.169.254", Network.LINK_LOCAL),
        ("fe80::1%eth0", Network.LINK_LOCAL),
    ],
)
def test_networks(address: str, network: Network) -> None:
    assert network_of(address) == network
    for source in Network:
        if source < network:
            with pytest.raises(NearerNetworkError):
                validate_hop(source, address)
        else:
            validate_hop(source, address)


def test_the_network_of_a_list() -> None:
    assert (
        network_of_list("http://127.0.0.1:80/list.csv") == network_of_list("http://localhost/l.csv") == Network.LOOPBACK
    )
    assert network_of_list("http://93.184.216.34/list.csv") == Network.PUBLIC
    for url in ("s3://bucket/list.csv", "pipe:cat list.csv", "http://nowhere.invalid/list.csv"):
        assert network_of_list(url) == Network.PUBLIC


@pytest.mark.parametrize("source", ["list.csv", "http://127.0.0.1/list.csv"])
@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80:0:0:0:0:0:0:1]", "[0:0:0:0:0:ffff:a9fe:a9fe]"])
def test_no_list_names_a_link_local_address(source: str, host: str) -> None:
    with pytest.raises(OSError, match=r"leads from this machine to .*, which is a link-local address") as raised:
        ByteRange(f"http://{host}/latest/meta-data/", origin=origin_of_list(source, ())).read()
    assert getattr(raised.value, "answer", "").startswith("not asked: it leads from this machine to ")


def test_no_redirect_leads_into_a_nearer_network(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"one")
    with serve(tmp_path) as server:

        def answer(request: Request) -> None:
            there = {"/near": f"{server.url}/1.jpg", "/nearer": "http://169.254.1.1/"}
            send(request, 302, Location=there[request.path])

        with serve_answers(answer) as url:
            assert ByteRange(f"{url}/near").read() == b"one"
            reason = "leads from this machine to 169.254.1.1, which is a link-local address"
            with pytest.raises(OSError, match=reason):
                ByteRange(f"{url}/nearer").read()
            with pytest.raises(ClipcidError, match=reason):
                open_remote(f"{url}/nearer").read(1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_public_list_names_no_address_in_a_nearer_network(host: str, tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"one")
    with serve(tmp_path) as server:
        url = f"{server.url}/1.jpg".replace("127.0.0.1", host)
        assert fetch_listed(url, LIMIT) == b"one"
        server.requests.clear()
        with pytest.raises(ClipcidError, match=r"leads from a public address to .*, which is this machine"):
            fetch_listed(url, LIMIT, "http://93.184.216.34/list.csv")
        assert not server.requests


def send_much(request: Request) -> None:
    send(request, 200, bytes(LIMIT + 1))


def send_endlessly(request: Request) -> None:
    request.send_response(200)
    request.end_headers()
    for _ in range(1000):  # as far as anybody reads it
        request.wfile.write(bytes(2**16))


def send_bomb(request: Request) -> None:
    send(request, 200, gzip.compress(bytes(10**7)), Content_Encoding="gzip")


@pytest.mark.parametrize("answer", [send_much, send_endlessly, send_bomb])
def test_no_more_is_received_than_an_image_may_have(answer: Callable[[Request], None]) -> None:
    asked = list[str | None]()

    def note(request: Request) -> None:
        asked.append(request.headers["Accept-Encoding"])
        answer(request)

    with serve_answers(note) as url, pytest.raises(TooManyBytesError, match=f"more than {LIMIT:,}"):
        ByteRange(f"{url}/1.jpg", max_bytes=LIMIT).read()
    assert asked == ["identity"]


def test_an_image_of_just_the_limit_is_read() -> None:
    with serve_answers(lambda request: send(request, 200, bytes(LIMIT))) as url:
        assert len(fetch_listed(f"{url}/1.jpg", LIMIT)) == LIMIT


def test_servers_that_do_not_answer_are_left_out_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(remote, "SKIP_SECONDS", 0.3)
    asked = list[str]()

    def wait(request: Request) -> None:
        asked.append(request.path)
        time.sleep(0.3)

    def fail(url: str) -> str:
        with pytest.raises(OSError, match="jpg") as raised:
            ByteRange(f"{url}/{len(asked)}.jpg").read()
        return str(raised.value)

    (tmp_path / "1.jpg").write_bytes(b"one")
    with serve_answers(wait) as url, serve(tmp_path) as server:
        for _ in range(remote.FAILURES):
            assert "could not be fetched: " in fail(url)
        for _ in range(100):
            assert f"{url} did not send the last {remote.FAILURES} images" in fail(url)
        assert asked == ["/0.jpg", "/1.jpg", "/2.jpg"]
        assert ByteRange(f"{server.url}/1.jpg").read() == b"one"
        with pytest.raises(OSError, match="not"):
            ByteRange(f"{server.url}/absent.jpg").read()
        time.sleep(0.3)
        assert "could not be fetched" in fail(url)
        assert len(asked) == remote.FAILURES + 1


@pytest.mark.parametrize("heeds", [True, False])
def test_parts_of_two_versions_are_never_joined(heeds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that heeds If-Match, and one that only says which version it sends."""
    monkeypatch.setattr(remote, "_REQUEST", 1000)
    contents = (b"a" * 3000, b"b" * 3000)
    matched = list[str | None]()

    def answer(request: Request) -> None:
        version = bool(matched)
        tag = f'"{version:d}"'
        asked = request.headers["Range"]
        if asked is None:
            send(request, 200, contents[version], ETag=tag)
            return
        matched.append(request.headers["If-Match"])
        if heeds and matched[-1] != tag:
            send(request, 412)
            return
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        part = contents[version][first : last + 1]
        send(request, 206, part, ETag=tag, Content_Range=f"bytes {first}-{last}/3000")

    with serve_answers(answer) as url:
        stream = open_remote(f"{url}/0.tar")
        assert stream.read(1000) == b"a" * 1000
        with pytest.raises(
            ClipcidError, match=r"0\.tar was replaced while it was read: it has changed since its first 1,000"
        ):
            stream.read(2000)
    assert matched == ['"0"', '"0"']


def test_a_version_is_remembered_when_a_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_REQUEST", 1000)
    monkeypatch.setattr(remote, "_WAITS", (0.01,))
    parts = list[str]()

    def answer(request: Request) -> None:
        """End the second part within it; then there is another version."""
        tag = f'"{len(parts) > 1:d}"'
        asked = request.headers["Range"]
        if asked is None:
            send(request, 200, bytes(3000), ETag=tag)
            return
        parts.append(asked)
        where = asked.replace("=", " ") + "/3000"
        sent = bytes(10 if len(parts) == 2 else 1000)
        send(request, 206, sent, ETag=tag, Content_Length="1000", Content_Range=where)
        request.close_connection = len(parts) == 2

    with serve_answers(answer) as url:
        stream = open_remote(f"{url}/0.tar")
        assert stream.read(1000) == bytes(1000)
        with pytest.raises(ClipcidError, match="was replaced while it was read"):
            stream.read(1000)
    assert len(parts) == 2
