"""A terminal of a given width that keeps what a person sees in the end."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
from pathlib import Path

from forks import Started

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


class Terminal:
    """A terminal of a given width; programs are started with `path` as their streams."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._ours, self._theirs = os.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        self.path = Path(os.ttyname(self._theirs))

    def watch(self, program: Started) -> str:
        """Wait for a program's end and return what is seen then."""
        received = b""
        ended = False
        while not ended:
            ended = program.poll() is not None
            while select.select([self._ours], [], [], 0.005)[0]:
                received += os.read(self._ours, 1 << 16)
        os.close(self._ours)
        os.close(self._theirs)
        screen = Screen(self._columns)
        screen.feed(received.decode())
        return screen.text()
