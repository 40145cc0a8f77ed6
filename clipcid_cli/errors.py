"""Errors that a user can cause and fix. Everything else is a bug and keeps its traceback under ``--debug``.

Whatever reads files, settings or data raises them; docstrings do not repeat it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from clipcid_cli.shown import redact

DEFAULT_WORK = Path("clipcid-work")


class ClipcidError(Exception):
    """A step cannot continue, and the user can do something about it."""

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(redact(message))
        self.message = redact(message)  # what is wrong, where, and both numbers when two disagree
        self.fix = redact(fix)  # what to type or change; may be empty only when the message already says it
        self.already_reported = False  # whether another process of the run prints it, so that the user reads it once

    def __str__(self) -> str:
        return f"{self.message}\n{self.fix}" if self.fix else self.message

    def __reduce__(self) -> tuple[type[ClipcidError], tuple[str, str]]:
        """Pickle by message and fix: errors of one process are told to the others and to the parent of a worker."""
        return type(self), (self.message, self.fix)


class TooManyBytesError(OSError):
    """A file of a sample is larger than ``--max-sample-bytes``: the sample is skipped and counted as `too_many_bytes`."""


class UsageError(ClipcidError):
    """The command line itself does not make sense; nothing was read or written."""

    exit_code = 2


def in_one_line(error: BaseException, limit: int = 300) -> str:
    """Return what an error of another library says, on one line and not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}…"


def command_line(*words: str | Path, **flags: Any) -> str:
    """Return a command for a fix, such that it can be pasted into a shell.

    Args:
        flags: Values by name, several in a tuple; None gives no flag, and neither does the default of `work`.
    """
    return " ".join(filter(None, [shlex.join(["clipcid", *map(str, words)]), flag_words(**flags)]))


def flag_words(**flags: Any) -> str:
    """Return flags as they are typed; `flags` are as of `command_line`."""
    line = list[str]()
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None and not (name == "work" and value == DEFAULT_WORK):
            for item in value if isinstance(value, tuple) else (value,):
                line += [f"--{flag}", str(item)]
    return shlex.join(line)
