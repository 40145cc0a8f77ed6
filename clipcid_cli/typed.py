"""Commands as people typed them: this run's own, which its outputs record, and those that made other outputs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from clipcid_cli.shown import redact

_words: tuple[str, ...] = ()


def remember(arguments: Sequence[str]) -> None:
    """Keep the arguments of this run's command line."""
    global _words
    _words = ("clipcid", *arguments)


def this_command() -> list[str]:
    """Return this run's command word by word, without secrets; empty where a step was called from Python."""
    return [redact(word) for word in _words]


def made_by(what: str, command: Sequence[str]) -> str:
    """Return the sentence with which a recorded command is shown; empty where none is recorded.

    Whoever wrote the record chose its words, so they are never offered as something to run.
    """
    shown = shlex.join(command).replace("\n", "\\n")
    return f"{what} made by: {shown}" if command else ""
