"""A stand-in for the Hugging Face hub: what an upload needs of its API, and repositories that change by commits alone."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKEN, ACCOUNT, ORGANISATION = "hf_right", "ann", "acme"

_LARGE = (".safetensors", ".onnx")


class HubServer(http.server.ThreadingHTTPServer):
    """Knows one token, whose account may write to one organisation.

    Attributes:
        repositories: Content of the files of each repository.
        private: Repositories that were made private.
        commits: Of each repository how many.
        refused: A pattern of requests, as in ``PUT /lfs``, that are answered by 400.
        ignored: Names that the .gitignore of each repository leaves out.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.refused, self.ignored = "nothing", set[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Answer a request by a status and JSON."""
        if re.search(self.refused, f"{method} {path}"):
            return 400, {"error": "not today"}
        if method == "PUT" and path.startswith("/lfs/"):
            self.blobs[hashlib.sha256(body).hexdigest()] = body
            return 200, {}
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": ACCOUNT, "type": "user"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        named = re.match(r"(?:/api/models)?/(\w+/[\w-]+)(?:\.git)?(/.*)?$", path)
        assert named is not None, path
        repository, rest = named[1], named[2] or ""
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._ask(repository, rest, body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repository = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != ORGANISATION:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if repository in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repository}"}
        self.repositories[repository], self.commits[repository] = {}, 0
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(repository)
        return 200, {"url": f"{self.url}/{repository}"}

    def _ask(self, repository: str, rest: str, body: bytes) -> tuple[int, Any]:
        files = self.repositories[repository]
        if rest.startswith("/preupload"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                    "shouldIgnore": file["path"] in self.ignored,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if rest == "/info/lfs/objects/batch":
            objects = [
                {**blob, "actions": {"upload": {"href": f"{self.url}/lfs/{blob['oid']}"}}}
                for blob in json.loads(body)["objects"]
            ]
            return 200, {"objects": objects, "transfer": "basic"}
        if rest.startswith("/commit/"):
            _, *operations = [json.loads(line) for line in body.splitlines()]
            added = {operation["value"]["path"]: self._read(operation) for operation in operations}
            self.repositories[repository] = files | added
            self.commits[repository] += 1
            oid = hashlib.sha1(body).hexdigest()
            return 200, {"commitUrl": f"{self.url}/{repository}/commit/{oid}", "commitOid": oid, "success": True}
        if rest.startswith("/tree/"):
            return 200, [_describe(name, content) for name, content in files.items()]
        return 200, {"id": repository, "siblings": [{"rfilename": name} for name in files]}

    def _read(self, operation: dict[str, Any]) -> bytes:
        value = operation["value"]
        return self.blobs[value["oid"]] if operation["key"] == "lfsFile" else base64.b64decode(value["content"])


def _describe(name: str, content: bytes) -> dict[str, Any]:
    """Describe a file as the hub does: hashed as git hashes it, a large one with its SHA-256."""
    size = len(content)
    oid = hashlib.sha1(f"blob {size}\0".encode() + content).hexdigest()
    entry = {"type": "file", "path": name, "size": size, "oid": oid}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
    return entry | ({"lfs": large} if name.endswith(_LARGE) else {})


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def _answer(self) -> None:
        body = self._read_body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        status, answer = self.server.answer(self.command, self.path.partition("?")[0], body, token)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    server = HubServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
