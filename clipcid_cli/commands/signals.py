"""What ends a run from outside: Ctrl-C, SIGTERM, and that nobody reads what it writes."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from clipcid_cli.runtime import interruption

UNREAD = 128 + signal.SIGPIPE
"""What a shell reports of a program that writes to a pipe nobody reads: 141."""

_LONGEST_GOODBYE = 2.0
"""Seconds that what is done before the end may take."""

_LONGEST_SAVE = 25.0
"""Seconds that work which saves itself may take; torchrun, SLURM and Kubernetes kill a process 30 s after SIGTERM."""

_UNNOTICED = 0.5
"""Seconds of saving that need no word."""

_SAME_SIGNAL = 1.0
"""Seconds in which a further signal is the same one: torchrun passes on the Ctrl-C that its processes have got already."""

_goodbyes = list[Callable[[], None]]()
_told = threading.Event()


def end_on_signals() -> None:
    """From now on, let Ctrl-C and SIGTERM end this process at once, with exit code 130 or 143 and one sentence.

    It may end anywhere: every output is whole or absent at any moment. Work that saves itself is given time to, see
    ``runtime/interruption.py``. A thread ends the process, since Python calls handlers in the main thread alone, and not
    before a product or a wait inside a library is over. Workers end with it.
    """
    signums = [
        signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) not in (signal.SIG_IGN, None)
    ]
    if threading.current_thread() is not threading.main_thread() or not signums:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python writes the signal's number there at once, whatever the main thread is doing, where a handler is set.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for signum in signums:
        signal.signal(signum, lambda *_: _told.set())  # the main thread goes on until the other one ends the process
    threading.Thread(target=_end, args=(reader, signums), daemon=True).start()


def _end(reader: int, signums: list[signal.Signals]) -> None:
    signum = _wait_for_signal(reader, signums)
    saves = interruption.ask()
    # By another thread, since the main one may hold a lock that it waits for.
    saying = threading.Thread(target=lambda: [goodbye() for goodbye in _goodbyes], daemon=True)
    saying.start()
    saying.join(_LONGEST_GOODBYE)
    if saves and not interruption.wait_until_saved(_UNNOTICED):
        _say("Saving what is done. Ctrl-C again ends at once.")
        threading.Thread(target=_end_at_second, args=(reader, signums), daemon=True).start()
        interruption.wait_until_saved(_LONGEST_SAVE)
    _end_now(signum)


def _end_at_second(reader: int, signums: list[signal.Signals]) -> None:
    first = time.monotonic()
    signum = _wait_for_signal(reader, signums)
    while time.monotonic() - first < _SAME_SIGNAL:
        signum = _wait_for_signal(reader, signums)
    _end_now(signum)


def _wait_for_signal(reader: int, signums: list[signal.Signals]) -> int:
    while (signum := os.read(reader, 1)[0]) not in signums:
        pass
    return signum


def _end_now(signum: int) -> None:
    _say(f"Interrupted. Run the same command again{interruption.describe_resumption()}.")
    os._exit(128 + signum)


def _say(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, f"{sentence}\n".encode())  # past Python's stream, which has a lock, too


def leave_end_to_signal() -> None:
    """Where a signal has come, wait for the thread that ends the process: it may have cut short a library's call."""
    if _told.is_set():
        threading.Event().wait(2 * _LONGEST_GOODBYE)


@contextmanager
def said_at_end(goodbye: Callable[[], None]) -> Iterator[None]:
    """Have something done, in another thread and for a short time, before a signal ends the process within the block."""
    _goodbyes.append(goodbye)
    try:
        yield
    finally:
        _goodbyes.remove(goodbye)


def open_closed() -> None:
    """Open a stream that leads nowhere in place of each that is closed, as by `2>&-`.

    Python leaves None there; and the next file opened would take its number, and get what libraries write to it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: that of the stream
            os.set_inheritable(descriptor, True)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # for good


def is_unread(stream: IO[str]) -> bool:
    """Tell whether a stream is a pipe, socket or terminal whose other end is closed."""
    if not hasattr(select, "poll"):
        return False
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # a stream of a program that calls us, or closed
        return False
    poll = select.poll()
    # Linux tells errors in any case; macOS only to those who want to write, and of a pipe that its end hung up.
    poll.register(descriptor, select.POLLOUT)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
