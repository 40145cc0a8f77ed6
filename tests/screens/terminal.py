"""A terminal of a given width that runs a command and keeps what a person sees in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable

_ROWS = 2000  # so that nothing scrolls out of sight
_SEQUENCE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\]8;[^\x1b]*\x1b\\")


class Screen:
    """The part of a VT100 that click and rich use; anything else is an error, so that nothing is kept as it never looked."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        """Show text: printable characters, line ends, cursor movements and erasures; colours leave no trace."""
        position = 0
        while position < len(text):
            sequence = _SEQUENCE.match(text, position)
            if sequence is not None:
                self._control(sequence[1] or "", sequence[2] or "m")
                position = sequence.end()
                continue
            self._put(text[position])
            position += 1

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._go_to(self.row + 1)
        elif character.isprintable():
            if self.column == self.columns:
                self._go_to(self.row + 1)
                self.column = 0
            line = self.lines[self.row]
            line.extend(" " * (self.column + 1 - len(line)))
            line[self.column] = character
            self.column += 1
        else:
            raise ValueError(f"the terminal does not know {character!r}")

    def _control(self, values: str, name: str) -> None:
        if name == "A":
            self.row = max(0, self.row - int(values or 1))
        elif name == "K" and values == "2":
            self.lines[self.row] = []
        elif not (name == "m" or (name in "hl" and values == "?25")):
            raise ValueError(f"the terminal does not know ESC [ {values} {name}")

    def _go_to(self, row: int) -> None:
        self.row = row
        while len(self.lines) <= row:
            self.lines.append([])

    def text(self) -> str:
        """Return what is seen, without blanks at the ends of lines."""
        return "\n".join("".join(line).rstrip() for line in self.lines).rstrip() + "\n"


def run_in_terminal(
    program: Callable[[], None],
    columns: int,
    timeout_seconds: float = 300.0,
) -> tuple[str, int]:
    """Run a program in a child process on a terminal of its own.

    Args:
        program: Called in the child; does not return (exec, or sys.exit).

    Returns:
        What is on the terminal in the end, and the exit status.
    """
    child, terminal = pty.fork()
    if child == 0:
        code = 70
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        try:
            program()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    received = b""
    end = time.monotonic() + timeout_seconds
    while True:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(received.decode(errors="replace"))
        if not select.select([terminal], [], [], 0.05)[0]:
            continue
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that the child closed its end
            chunk = b""
        if not chunk:
            break
        received += chunk
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    screen = Screen(columns)
    screen.feed(received.decode())
    return screen.text(), os.waitstatus_to_exitcode(status)
