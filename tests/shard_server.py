"""A web server for tests: it sends ranges or not, drops connections in the middle, and answers slowly."""

from __future__ import annotations

import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class ShardServer(http.server.ThreadingHTTPServer):
    """Serves the files of a folder on 127.0.0.1.

    Attributes:
        drop_every: Of so many requests for content, the connection of one ends half-way; 0 for none.
        delay: Seconds before each answer.
        damaged: Name of a file whose third block of 512 bytes is sent as question marks.
        sends_ranges: Whether a request for a part is answered with the part.
        requests: Requests for content by file.
        bytes_sent: Bytes of content by file.
        dropped: Connections dropped.
        overloaded: So many of the next requests are answered by 503.
        most_at_once: The most requests that waited for their answer at a time.
    """

    daemon_threads = True

    def __init__(self, folder: Path, drop_every: int = 0, delay: float = 0.0, *, sends_ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.drop_every, self.delay, self.sends_ranges = folder, drop_every, delay, sends_ranges
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.dropped, self.damaged, self.overloaded = 0, "", 0
        self.answering = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ShardServer

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        server, name = self.server, self.path.partition("?")[0].lstrip("/")  # a signature is not looked at
        with server.lock:
            server.answering += 1
            server.most_at_once = max(server.most_at_once, server.answering)
        time.sleep(server.delay)
        with server.lock:
            server.answering -= 1
        path = server.folder / name
        with server.lock:
            server.overloaded -= 1
            refuses = server.overloaded >= 0
        if refuses:
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if name == server.damaged:
            content = content[:1024] + b"?" * 512 + content[1536:]
        start, stop, total = 0, len(content), len(content)
        asked = self.headers.get("Range")
        if asked and server.sends_ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, total) if last else total
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if server.sends_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not with_content:
            return
        with server.lock:
            server.requests[name] += 1
            drops = server.drop_every > 0 and sum(server.requests.values()) % server.drop_every == 0
            server.dropped += drops
            server.bytes_sent[name] += (stop - start) // (2 if drops else 1)
        if drops:
            self.wfile.write(content[start : (start + stop) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[start:stop])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path, drop_every: int = 0, delay: float = 0.0, *, sends_ranges: bool = True) -> Iterator[ShardServer]:
    """Serve a folder while the block runs."""
    with ShardServer(folder, drop_every, delay, sends_ranges=sends_ranges) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serve_answers(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Answer each request by a function while the block runs; gives the server's address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with suppress(ConnectionError):  # of those who have read enough
                answer(self)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Say nothing of those who have read enough."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def send(request: http.server.BaseHTTPRequestHandler, status: int, content: bytes = b"", **headers: str) -> None:
    """Send an answer; an underscore in a header's name stands for a hyphen."""
    request.send_response(status)
    for name, value in ({"Content_Length": str(len(content))} | headers).items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content)
