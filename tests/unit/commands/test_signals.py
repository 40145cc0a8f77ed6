"""A stream that nobody reads is known as one, on each system."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from typing import IO

import pytest

from clipcid_cli.commands.signals import is_unread


class MacPoll:
    """`select.poll` as macOS has it: errors are told only to those who want to write."""

    def __init__(self) -> None:
        self._poll, self._asked = poll(), dict[int, int]()

    def register(self, number: int, events: int) -> None:
        self._asked[number] = events
        self._poll.register(number, events)

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        return [(number, state) for number, state in self._poll.poll(timeout) if self._asked[number] & select.POLLOUT]


poll = select.poll


def make_pipe() -> tuple[int, int]:
    return os.pipe()


def make_sockets() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


@pytest.mark.parametrize("make", [make_pipe, make_sockets])
@pytest.mark.parametrize("system", [poll, MacPoll])
def test_a_stream_is_unread_where_its_reader_has_gone(
    make: Callable[[], tuple[int, int]], system: type[MacPoll], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "poll", system)
    reader, writer = make()
    stream: IO[str]
    with open(writer, "w") as stream:
        assert not is_unread(stream)
        os.close(reader)
        assert is_unread(stream)
