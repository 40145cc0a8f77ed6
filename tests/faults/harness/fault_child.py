"""One command line in a forked child of a process that has imported everything, with faults put into it at its start."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import importlib
import io
import itertools
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from one_process import Outcome
from package import import_package

from clipcid_cli.cli import main

_WRITING = os.O_WRONLY | os.O_RDWR
_COUNTED = ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "ftruncate", "posix_fallocate")

# Beside the package.
_IMPORTED = (
    *("faiss", "jinja2", "matplotlib.figure", "open_clip", "pyarrow.dataset"),
    *(
        f"transformers.models.clip.{name}_clip"
        for name in ("modeling", "processing", "image_processing", "tokenization")
    ),
)

Act = Callable[[str, list[tuple[int, int]]], None]
"""Takes the name of the operation, and of each file that was written and not flushed to the disk an open descriptor and the
size that it had when it was opened: so much of it was on the disk."""
Hook = Callable[[], None]


def import_everything() -> None:
    """Import once what the command lines import, so that a case is a fork."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "100", "GOMP_SPINCOUNT": "0"}
    os.environ |= {"CLIPCID_WORKERS": "0", "CLIPCID_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    import_package()
    for module in _IMPORTED:
        importlib.import_module(module)


class Operations:
    """Counts the file operations of this process, logs them, and acts before or after one of them.

    Counted are those of `os` that create, rename, flush or remove, and the opening of a file for writing.
    """

    def __init__(self, log: Path, at: int | None = None, after: bool = False, act: Act | None = None) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._numbers = itertools.count()
        self._act_at = (at, after)
        self._act = act
        self._unflushed: dict[tuple[int, int], tuple[int, int]] = {}
        self._open = os.open

    def install(self) -> None:
        """Wrap the functions, for the rest of this process."""
        for name in _COUNTED:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        os.open = self._wrap("open", os.open, lambda flags=0, *_, **__: flags & _WRITING)  # type: ignore[assignment]
        opened = self._wrap("open", io.open, lambda mode="r", *_, **__: set(mode) & set("wax+"))
        builtins.open = io.open = opened

    def _wrap(self, name: str, real: Any, is_counted: Callable[..., Any] = lambda *_, **__: True) -> Any:
        def counted(target: Any, *rest: Any, **named: Any) -> Any:
            if not is_counted(*rest, **{key: value for key, value in named.items() if key in ("mode", "flags")}):
                return real(target, *rest, **named)
            number = next(self._numbers)
            os.write(self._log, f"{name} {target}\n".encode(errors="surrogateescape"))
            if self._act is not None and self._act_at == (number, False):
                self._act(name, list(self._unflushed.values()))
            try:
                result = real(target, *rest, **named)
                self._follow(name, target)
                return result
            finally:
                if self._act is not None and self._act_at == (number, True):
                    self._act(name, list(self._unflushed.values()))

        return counted

    def _follow(self, name: str, target: Any) -> None:
        """Keep a descriptor of a file from its opening for writing until it is flushed, whatever it is called by then."""
        if name == "fsync":
            found = os.fstat(target)
            descriptor, _ = self._unflushed.pop((found.st_dev, found.st_ino), (os.dup(target), 0))
            os.close(descriptor)
        elif name == "open" and not isinstance(target, int):
            with contextlib.suppress(OSError):  # relative to a folder that is open
                descriptor = self._open(target, os.O_WRONLY | os.O_NONBLOCK)
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode) or (found.st_dev, found.st_ino) in self._unflushed:
                    os.close(descriptor)
                else:
                    self._unflushed[found.st_dev, found.st_ino] = descriptor, found.st_size


def read_operations(log: Path) -> list[str]:
    """Return what `Operations` logged: the function and its first argument."""
    return log.read_text(errors="replace").splitlines()


def kill(name: str, unflushed: list[tuple[int, int]]) -> None:
    """Die as of `kill -9`, or at a flush or a renaming of a power cut: half of what is not on the disk is lost."""
    for descriptor, flushed in unflushed if name in ("fsync", "rename", "replace") else ():
        os.truncate(descriptor, (flushed + os.fstat(descriptor).st_size) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def shift_clock(offset: float, drift: float = 0.0) -> None:
    """Let the clock of this process go wrong: by `offset` seconds, and by `drift` more whenever it is read."""
    real, reads = time.time, itertools.count()

    def now() -> float:
        return real() + offset + drift * next(reads)

    time.time = now
    time.time_ns = lambda: int(now() * 1e9)


@dataclasses.dataclass
class Running:
    """A command line that runs in a child.

    Attributes:
        process: The number of the child.
        out: The reading end of the pipe that is its stdout.
        err: That of its stderr.
        ready: That of a pipe into which it writes when it heeds signals.
    """

    arguments: tuple[str, ...]
    process: int
    out: int
    err: int
    ready: int

    def wait_until_ready(self) -> None:
        """Wait until it heeds signals, or has ended."""
        os.read(self.ready, 1)

    def has_ended(self) -> bool:
        """Tell whether it has ended; `finish` collects it."""
        return os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def finish(self, patience: float = 30.0) -> Outcome:
        """Wait for its end; one that takes longer is said to hang, and killed.

        Returns:
            What it did; a signal that killed it is a negative exit code.
        """
        deadline, code = time.monotonic() + patience, None
        while (ended := os.waitpid(self.process, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.002)
        if ended[0]:
            code = os.waitstatus_to_exitcode(ended[1])
        else:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self.ready)
        return Outcome(self.arguments, code, _read_rest(self.out), _read_rest(self.err))


def _read_rest(pipe: int) -> str:
    """Read what is in a pipe and close it; a process that the child left may still hold the other end."""
    os.set_blocking(pipe, False)
    found = b""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(pipe, 1 << 16):
            found += part
    os.close(pipe)
    return found.decode(errors="replace")


def start(
    arguments: tuple[str, ...], cwd: Path, hook: Hook | None = None, environment: dict[str, str] | None = None
) -> Running:
    """Start a command line in a child.

    Args:
        hook: Called in the child first; puts a fault in.
    """
    pipes = [os.pipe() for _ in range(3)]
    process = os.fork()
    if process == 0:
        try:
            _run_here(arguments, cwd, [writer for _, writer in pipes], hook, environment or {})
        finally:
            os._exit(70)
    for _, writer in pipes:
        os.close(writer)
    return Running(arguments, process, *(reader for reader, _ in pipes))


def _run_here(
    arguments: tuple[str, ...], cwd: Path, pipes: list[int], hook: Hook | None, environment: dict[str, str]
) -> NoReturn:
    os.chdir(cwd)
    os.environ |= environment
    out, err, ready = pipes
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # open until the process ends
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
    set_handler = signal.signal

    def set_handler_and_say(number: int, handler: Any) -> Any:
        before = set_handler(number, handler)
        if number == signal.SIGTERM and callable(handler):
            os.write(ready, b".")
        return before

    signal.signal = set_handler_and_say  # type: ignore[assignment]
    if hook is not None:
        hook()
    main(arguments)
