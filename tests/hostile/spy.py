"""What is in every process of a watched command: it writes down, and refuses, what no data may cause.

An audit hook sees what Python does: code that is run, files, processes, connections. The names of a made-up internet lead to
servers on this machine, so that a "public" server can be tried without one; every other address is refused before a packet
leaves. Only the standard library is imported here: the hook is there before anything else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

VARIABLE = "SPY_RULES"
_STARTUP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DEVICES = ("/dev/null", "/dev/tty", "/dev/shm/", "/proc/self/")
# Events that change the files at some of their arguments, and which these are: a path, and its folder's descriptor.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
_PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"}
_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
# Parts of fsspec that plain files and web servers take.
_PLAIN = {
    f"fsspec.implementations.{name}" for name in ("asyn_wrapper", "chained", "http", "http_sync", "local", "memory")
}
_BACKENDS = (
    "fsspec.implementations.",
    "huggingface_hub.hf_file_system",
    "s3fs",
    "gcsfs",
    "adlfs",
    "paramiko",
    "smbclient",
)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a command may do.

    Attributes:
        log: What happens is appended to this file, a JSON object a line.
        place: Folder whose files are data: none of them is code.
        writable: Folders in which files may be made, changed and removed.
        private: Folders whose files may not be read.
        commands: Shell commands that were typed.
        hosts: ``address:port`` of servers that were named.
        names: Addresses of the made-up internet by name.
        routes: Ports on this machine by ``address:port`` of the made-up internet.
        file_bytes: No file grows beyond.
        umask: That of the processes.
    """

    log: str
    place: str
    writable: tuple[str, ...]
    private: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    routes: dict[str, int] = dataclasses.field(default_factory=dict)
    file_bytes: int = 2**29
    umask: int = 0o022


def watch(rules: Rules) -> None:
    """Watch this process and all that it starts."""
    os.environ[VARIABLE] = json.dumps(dataclasses.asdict(rules))
    paths = [_STARTUP, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, dict.fromkeys(paths)))
    sys.dont_write_bytecode = True
    tempfile.tempdir = None  # another one may have been chosen where this process was forked
    # Where libraries keep code that they fetch; of a fork they have chosen it before.
    os.environ["HF_MODULES_CACHE"] = os.path.join(
        os.environ.get("HOME", rules.place), ".cache", "huggingface", "modules"
    )
    os.umask(rules.umask)
    resource.setrlimit(resource.RLIMIT_FSIZE, (rules.file_bytes, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spy = _Spy(rules)
    spy.announce()
    os.register_at_fork(after_in_child=spy.announce)
    _note_fsync(spy)
    _make_internet(spy)
    for name in list(filter(_is_backend, sys.modules)):  # of what a fork has inherited
        del sys.modules[name]
    sys.meta_path.insert(0, spy)  # `importlib.import_module` raises no event
    sys.addaudithook(spy)


def watch_by_environment() -> None:
    """Watch this process by the rules in its environment, where there are any."""
    if VARIABLE in os.environ:
        rules = json.loads(os.environ[VARIABLE])
        watch(Rules(**{name: tuple(value) if isinstance(value, list) else value for name, value in rules.items()}))


class _Spy:
    """The audit hook."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.state = threading.local()
        self._log = os.open(rules.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._judges: dict[str, Callable[[str, tuple[Any, ...]], None]] = {
            "ctypes.dlopen": self._judge_library,
            "exec": self._judge_code,
            "import": self._judge_import,
            "open": self._judge_open,
            "socket.connect": self._judge_connection,
            "socket.sendto": self._judge_connection,
        }
        self._judges |= dict.fromkeys(_CHANGES, self._judge_change)
        self._judges |= dict.fromkeys(_PROCESSES, self._judge_process)
        self._judges |= dict.fromkeys(_LOOKUPS, self._judge_lookup)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        judge = self._judges.get(event)
        if judge is None or getattr(self.state, "is_busy", False):
            return
        self.state.is_busy = True
        try:
            judge(event, arguments)
        finally:
            self.state.is_busy = False

    def find_spec(self, name: str, *_: object) -> None:
        """Judge the name of a module that is about to be imported; it is found by others."""
        if _is_backend(name):
            self.refuse("reached for a file system", name)

    def announce(self) -> None:
        """Write down that this process begins, and the memory that it begins with."""
        self.note("process", peak_memory(os.getpid()))

    def note(self, event: str, what: object) -> None:
        """Write down what is allowed."""
        line = json.dumps({"event": event, "what": what, "pid": os.getpid()})
        os.write(self._log, f"{line}\n".encode())

    def refuse(self, event: str, what: object) -> None:
        """Write down what is not, and keep it from happening."""
        line = json.dumps({"event": event, "what": str(what)[:500], "pid": os.getpid(), "refused": True})
        os.write(self._log, f"{line}\n".encode())
        raise PermissionError(1, f"refused by the spy: {event}")

    def _judge_code(self, _event: str, arguments: tuple[Any, ...]) -> None:
        name = getattr(arguments[0], "co_filename", "")
        if os.path.isabs(name) and self._is_data(os.path.realpath(name)):
            self.refuse("ran code", name)

    def _judge_library(self, _event: str, arguments: tuple[Any, ...]) -> None:
        name = arguments[0]
        if isinstance(name, str) and os.sep in name and self._is_data(os.path.realpath(name)):
            self.refuse("loaded a library", name)

    def _judge_import(self, _event: str, arguments: tuple[Any, ...]) -> None:
        file = arguments[1]
        if isinstance(file, str) and self._is_data(os.path.realpath(file)):
            self.refuse("loaded a library", file)

    def _judge_open(self, _event: str, arguments: tuple[Any, ...]) -> None:
        path, _mode, flags = arguments
        if not isinstance(path, str | bytes):
            return
        path = os.fsdecode(path)
        if flags & _WRITES:
            follows = not flags & os.O_NOFOLLOW and not (flags & os.O_CREAT and flags & os.O_EXCL)
            self._judge_written("open", os.path.realpath(path) if follows else _place_of(path))
        elif any(_is_below(os.path.realpath(path), folder) for folder in self.rules.private):
            self.refuse("read a private file", path)

    def _judge_change(self, event: str, arguments: tuple[Any, ...]) -> None:
        places = []
        for at, folder_at in _CHANGES[event]:
            path = arguments[at]
            folder = arguments[folder_at] if folder_at is not None else -1
            if isinstance(path, int):
                places.append(os.readlink(f"/proc/self/fd/{path}"))
                continue
            path = os.fsdecode(path)
            if isinstance(folder, int) and folder >= 0 and not os.path.isabs(path):
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            places.append(_place_of(path))
        for place in places:
            self._judge_written(event, place)
        if event == "os.rename":
            self.note("rename", places)

    def _judge_written(self, event: str, place: str) -> None:
        if any(_is_below(place, folder) for folder in self.rules.writable):
            self.note({"open": "wrote", "os.mkdir": "made a folder"}.get(event, event), place)
        elif not place.startswith(_DEVICES):
            self.refuse(f"wrote outside ({event})", place)

    def _judge_process(self, event: str, arguments: tuple[Any, ...]) -> None:
        words = arguments[1] if event == "subprocess.Popen" and arguments[1] else arguments[0]
        words = " ".join(map(_text, words)) if isinstance(words, list | tuple) else _text(words)
        if any(command in words for command in self.rules.commands):
            self.note("command", words)
        else:
            self.refuse("started a process", f"{event} {words}")

    def _judge_connection(self, event: str, arguments: tuple[Any, ...]) -> None:
        address = arguments[1]
        if isinstance(address, str | bytes) or getattr(self.state, "is_routed", False):
            return  # a socket of this machine's file system
        if f"{address[0]}:{address[1]}" not in self.rules.hosts:
            self.refuse("connected", f"{address[0]}:{address[1]} ({event})")

    def _judge_lookup(self, event: str, arguments: tuple[Any, ...]) -> None:
        host = arguments[0]
        host = host.decode() if isinstance(host, bytes) else host
        named = {place.rpartition(":")[0] for place in self.rules.hosts}
        if host in (None, "", "localhost", socket.gethostname(), *named) or _is_address(host):
            return
        self.refuse("looked up", f"{host} ({event})")

    def _is_data(self, path: str) -> bool:
        return _is_below(path, self.rules.place)


def peak_memory(pid: int) -> int:
    """Return the most memory that a process has had, in bytes; 0 where it has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            line = next((line for line in file if line.startswith("VmHWM:")), "")
    except OSError:
        return 0
    return int(line.split()[1]) * 1024 if line else 0


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _is_backend(name: str) -> bool:
    return name.startswith(_BACKENDS) and name not in _PLAIN


def _place_of(path: str) -> str:
    """Return where a path itself lies, whatever a link of its name points to."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def _text(word: Any) -> str:
    return os.fsdecode(word) if isinstance(word, bytes | os.PathLike) else str(word)


def _is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return True
    return False


def _note_fsync(spy: _Spy) -> None:
    """Write down what is flushed to the disk; no audit event says so."""
    flush = os.fsync

    def fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        spy.note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(file)

    os.fsync = fsync


def _make_internet(spy: _Spy) -> None:
    """Let names and addresses of the made-up internet lead to servers on this machine."""
    rules = spy.rules
    look_up, connect, peer = socket.getaddrinfo, socket.socket.connect, socket.socket.getpeername
    reached: dict[int, tuple[str, int]] = {}

    def getaddrinfo(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return look_up(rules.names.get(name, host), port, *arguments, **options)

    def route(self: socket.socket, address: Any) -> None:
        port = rules.routes.get(f"{address[0]}:{address[1]}") if isinstance(address, tuple) else None
        if port is None:
            connect(self, address)
            return
        spy.note("routed", f"{address[0]}:{address[1]}")
        reached[self.fileno()] = (address[0], address[1])
        spy.state.is_routed = True
        try:
            connect(self, ("127.0.0.1", port))
        finally:
            spy.state.is_routed = False

    def getpeername(self: socket.socket) -> Any:
        address = peer(self)
        return reached.get(self.fileno(), address) if address[0] == "127.0.0.1" else address

    socket.getaddrinfo = getaddrinfo
    socket.socket.connect = route  # type: ignore[method-assign]
    socket.socket.getpeername = getpeername  # type: ignore[method-assign]
