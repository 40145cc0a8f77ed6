"""Faults that are put into a command line at its start, in the fork that runs it."""

from __future__ import annotations

import builtins
import contextlib
import io
import itertools
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR
_COUNTED = ("replace", "rename", "fsync", "unlink", "remove", "rmdir", "mkdir", "ftruncate", "posix_fallocate")

Act = Callable[[str, list[tuple[int, int]]], None]
"""Takes the name of the operation, and of each file that was written and not flushed to the disk an open descriptor and the
size that it had when it was opened: so much of it was on the disk."""


def kill(name: str, unflushed: list[tuple[int, int]]) -> None:
    """Die as of `kill -9`, or at a flush or a renaming of a power cut: half of what is not on the disk is lost."""
    for descriptor, flushed in unflushed if name in ("fsync", "rename", "replace") else ():
        os.truncate(descriptor, (flushed + os.fstat(descriptor).st_size) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def pause(reached: Path, seconds: float, name: str, unflushed: list[tuple[int, int]]) -> None:
    """Tell that the operation is reached, and be slow."""
    reached.touch()
    time.sleep(seconds)


def count_operations(log: Path, at: int | None = None, after: bool = False, act: Act = kill) -> None:
    """Log the file operations of this process, and act before or after one of them."""
    _Operations(log, at, after, act).install()


class _Operations:
    """Counted are those of `os` that create, rename, flush or remove, and the opening of a file for writing."""

    def __init__(self, log: Path, at: int | None, after: bool, act: Act) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._numbers = itertools.count()
        self._act_at = (at, after)
        self._act = act
        self._unflushed: dict[tuple[int, int], tuple[int, int]] = {}
        self._acting: int | None = None  # the thread that acts
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
            self._wait_for_other_threads()
            number = next(self._numbers)
            os.write(self._log, f"{name} {target}\n".encode(errors="surrogateescape"))
            if self._act_at == (number, False):
                self._act_alone(name)
            try:
                result = real(target, *rest, **named)
                self._follow(name, target)
                return result
            finally:
                if self._act_at == (number, True):
                    self._act_alone(name)

        return counted

    def _act_alone(self, name: str) -> None:
        self._acting = threading.get_ident()
        try:
            self._act(name, list(self._unflushed.values()))
        finally:
            self._acting = None

    def _wait_for_other_threads(self) -> None:
        """Let no thread give a file its final name between the moment another one cuts that file and the end."""
        while self._acting not in (None, threading.get_ident()):
            time.sleep(0.01)

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
    """Return what `count_operations` logged: the function and its first argument."""
    return log.read_text(errors="replace").splitlines()


def break_clock(offset: float, drift: float, log: Path, at: int | None = None) -> None:
    """Let the clock be wrong by `offset` seconds, and by `drift` more whenever it is read; die at an operation."""
    real, reads = time.time, itertools.count()

    def now() -> float:
        return real() + offset + drift * next(reads)

    time.time = now
    time.time_ns = lambda: int(now() * 1e9)
    count_operations(log, at)


def hasten(log: Path, at: int | None = None) -> None:
    """Let the clock that paces saves run 10,000 times as fast, so that a short run saves; die after an operation."""
    real = time.monotonic
    time.monotonic = lambda: 1e4 * real()
    count_operations(log, at, after=True)


def tell_when_ready(ready: Path) -> None:
    """Make a file once this process heeds signals."""
    set_handler = signal.signal

    def set_handler_and_tell(number: int, handler: Any) -> Any:
        before = set_handler(number, handler)
        if number == signal.SIGTERM and callable(handler):
            ready.touch()
        return before

    signal.signal = set_handler_and_tell  # type: ignore[assignment]
