"""Ctrl-C and SIGTERM: the run ends within seconds, and the same command continues it. And what stands for SIGPIPE."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

GRACE = 4.0
"""Seconds in which a signalled run can end by itself; a product or a wait inside a library does not let Python's handlers
run. Every output is whole or absent at any moment, so that it may end anywhere."""
UNREAD = 128 + signal.SIGPIPE
"""What a shell reports of a program that writes to a pipe nobody reads: 141."""


class Signals:
    """What ends the run from outside.

    Attributes:
        received: The signal that asked the run to end; None as long as none did.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._ended = threading.Event()

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def watch(self, report: Callable[[], None]) -> None:
        """Raise KeyboardInterrupt in the main thread on SIGTERM too, and end the process where that is not heeded in time.

        Args:
            report: Says why the run ended, just before it is ended.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, self._handle)
        # Python writes the signal's number here at once, whatever the main thread is doing.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._end_late, args=(reader, writer, report), daemon=True).start()

    def stop(self) -> None:
        """End watching: the process is about to exit."""
        self._ended.set()

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is None:  # one is enough: another must not disturb what the first one ends
            self.received = number
            raise KeyboardInterrupt

    def _end_late(self, reader: socket.socket, writer: socket.socket, report: Callable[[], None]) -> None:
        while (number := reader.recv(1)[0]) not in (signal.SIGINT, signal.SIGTERM):
            pass
        if self._ended.wait(GRACE):
            return
        self.received = number
        report()
        sys.stderr.flush()
        os._exit(self.exit_code)


def open_closed() -> None:
    """Open a stream that leads nowhere in place of each that is closed, as by `2>&-`.

    Python leaves None there; and the next file opened would take its number, and get what libraries write to it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: that of the stream
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # for good


def drop_unread() -> bool:
    """Let stdout and stderr go nowhere where their reader has gone, and tell whether one has."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for stream in unread:
        drop(stream)
    return bool(unread)


def drop(stream: IO[str]) -> None:
    """Let what is written to a stream go nowhere, with what is in its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _is_unread(stream: IO[str]) -> bool:
    """Tell whether a stream is a pipe, socket or terminal whose other end is closed."""
    if not hasattr(select, "poll"):
        return False
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # a stream of a program that calls us, or closed
        return False
    poll = select.poll()
    # Linux tells errors in any case; macOS only to those who want to write, and of a pipe that its end hung up.
    poll.register(number, select.POLLOUT)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
