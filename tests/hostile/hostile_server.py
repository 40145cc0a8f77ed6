"""A web server that lies: endless bodies, bombs, redirects, files that change while they are read, silence."""

from __future__ import annotations

import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Answer = Callable[["Request"], None]


class Request(http.server.BaseHTTPRequestHandler):
    """One request; `Server.answers` says by its path what is done with it."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests[path] += 1
        answer = self.server.answers.get(path)
        if answer is None:
            self.send_error(404)
        else:
            answer(self)

    def head(self, status: int, **headers: object) -> None:
        """Send a status and headers; ``Content_Type=…`` is the header Content-Type."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, data: bytes) -> None:
        """Send content, unless only the headers were asked for."""
        if self.command == "GET":
            self.wfile.write(data)
            self.server.bytes_sent[self.path.partition("?")[0]] += len(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Answers on 127.0.0.1.

    Attributes:
        answers: What is done with a request, by path.
        requests: Requests by path.
        bytes_sent: Bytes of content by path.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers: dict[str, Answer] = {}
        self.requests: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()
        self.is_over = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def handle_error(self, *_: object) -> None:
        """Say nothing of a client that hangs up: it is what a careful one does."""


@contextmanager
def serve_lies(**answers: Answer) -> Iterator[Server]:
    """Answer ``/name`` for each name while the block runs; further answers may be added."""
    with Server() as server:
        server.answers |= {f"/{name}": answer for name, answer in answers.items()}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.is_over.set()
            server.shutdown()
            thread.join()


def whole(content: bytes, **headers: object) -> Answer:
    """Send all of a file, whatever part was asked for."""

    def answer(request: Request) -> None:
        request.head(200, Content_Length=len(content), **headers)
        request.send(content)

    return answer


def redirect(url: str) -> Answer:
    return lambda request: request.head(302, Location=url, Content_Length=0)


def endless(begin: bytes = b"", claimed: int | None = None) -> Answer:
    """Send zeros after `begin` until the client hangs up, or up to a claimed size."""

    def answer(request: Request) -> None:
        if claimed is None:
            request.head(200, Connection="close")
        else:
            request.head(200, Content_Length=claimed)
        request.send(begin)
        left = (claimed or 2**62) - len(begin)
        while request.command == "GET" and left and not request.server.is_over.is_set():
            size = min(2**20, left)
            request.send(bytes(size))
            left -= size

    return answer


def silent(request: Request) -> None:
    """Accept the connection and say nothing."""
    request.server.is_over.wait(600)


def trickle(begin: bytes) -> Answer:
    """Send a byte a second after the headers of a file of a megabyte."""

    def answer(request: Request) -> None:
        request.head(200, Content_Length=2**20)
        request.send(begin)
        while request.command == "GET" and not request.server.is_over.is_set():
            request.send(b"\0")
            time.sleep(1)

    return answer


def changing(*versions: bytes) -> Answer:
    """Send parts of a file that is another one after each request for a part, and says so by its ETag."""
    count = 0

    def answer(request: Request) -> None:
        nonlocal count
        version = min(count, len(versions) - 1)
        content = versions[version]
        wanted = request.headers.get("If-Match")
        tag = f'"version-{version}"'
        if wanted not in (None, "*", tag):
            request.head(412, Content_Length=0, ETag=tag)
            return
        asked = request.headers.get("Range")
        if asked is None:
            request.head(200, Content_Length=len(content), ETag=tag, Accept_Ranges="bytes")
            request.send(content)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(content)) if last else len(content)
        place = f"bytes {start}-{stop - 1}/{len(content)}"
        request.head(206, Content_Length=stop - start, Content_Range=place, ETag=tag, Accept_Ranges="bytes")
        request.send(content[start:stop])
        count += request.command == "GET"

    return answer
