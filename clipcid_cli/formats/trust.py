"""Whose a work directory is, and whether what a step writes there stays there.

The rule of ownership is that of git's ``safe.directory``: a folder of another person is not written to unasked. The folder
that the user names may be a link; a link inside it may have come with an archive, and leads wherever its author wished.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from clipcid_cli.errors import ClipcidError

_DEPTH = 3  # of folders that steps write to, such as distill/<name>/checkpoints
_NOBODY = (2**16 - 2, 2**32 - 2)  # who files belong to whose owner is not known here: in containers, over NFS


def validate_work(work: Path) -> None:
    """Refuse a work directory of another ordinary user, and one with a linked folder that leads out of it."""
    if not work.is_dir():
        return
    status = work.stat()
    if not _is_own(status):
        raise ClipcidError(
            f"The work directory {work} belongs to another user ({_name_user(status.st_uid)}).",
            "Add --trust-work to write there, or choose another --work; --embeddings reads its embeddings all the same.",
        )
    inside = work.resolve()
    for link in _linked_folders(work, _DEPTH):
        if not link.resolve().is_relative_to(inside):
            raise ClipcidError(
                f"{link} is a link out of the work directory, to {link.resolve()}.",
                "Add --trust-work to write there, or replace the link by a folder.",
            )


def _is_own(status: os.stat_result) -> bool:
    """Tell whether a folder is the user's, the system's, or one that the user's group shares.

    To root, who in a container owns nothing of what is mounted there, owners say nothing.
    """
    user = os.geteuid()
    if user == 0 or status.st_uid in (0, user, *_NOBODY):
        return True
    is_shared = bool(status.st_mode & stat.S_IWGRP)
    return is_shared and status.st_gid in (os.getegid(), *os.getgroups())


def _name_user(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"number {user}"


def _linked_folders(folder: Path, depth: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                if entry.is_dir():
                    yield Path(entry.path)
            elif depth > 1 and entry.is_dir():
                yield from _linked_folders(Path(entry.path), depth - 1)
