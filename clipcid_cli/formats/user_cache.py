"""The user's own cache, which other users cannot read or write: copies of shards, and hashes of files read before."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of the cache: ``CLIPCID_CACHE``, or ``clipcid`` in the user's cache folder."""
    own = os.environ.get("CLIPCID_CACHE")
    return Path(own) if own else user_folder()


def user_folder() -> Path:
    """Return ``clipcid`` in the user's cache folder, which is never shared as the folder of copies may be."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipcid"


def make_private(folder: Path) -> None:
    """Make a folder that only the user enters, whatever the umask; one that is there stays as it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
