"""Data at a URL: fsspec lists it, and each file is copied once to a local cache and read from there."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec

from clipcid_cli.errors import ClipcidError


def is_url(spec: str) -> bool:
    """Tell a URL from a local path."""
    return "://" in spec


def cache_folder() -> Path:
    """Return the folder of copies: ``CLIPCID_CACHE``, or ``clipcid`` in the user's cache folder. It is never emptied."""
    configured = os.environ.get("CLIPCID_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipcid"


def local_copy(path: str) -> Path:
    """Return a local path with the content of `path`; a URL is fetched unless it was before.

    Raises:
        ClipcidError: when it cannot be fetched, or does not fit on the disk.
    """
    if not is_url(path):
        return Path(path)
    name = hashlib.blake2b(path.encode(), digest_size=12).hexdigest() + "-" + path.rstrip("/").rpartition("/")[2]
    copy = cache_folder() / name
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may fetch the same shard: each into a file of its own, the last rename wins with the same bytes.
    partial = copy.with_name(f".{name}.{os.getpid()}.partial")
    try:
        filesystem, inner = open_filesystem(path)
        size = filesystem.size(inner) or 0
        free = shutil.disk_usage(copy.parent).free
        if size > free:
            raise ClipcidError(
                f"{path} has {size:,} bytes; {copy.parent} has {free:,} free.",
                "Free some space, or set CLIPCID_CACHE to a folder on a larger disk.",
            )
        filesystem.get_file(inner, str(partial))
        partial.replace(copy)
    except ClipcidError:
        raise
    except Exception as error:  # every fsspec backend raises its client's own errors
        raise fetch_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return copy


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the path within it.

    Raises:
        ClipcidError: when fsspec has no such protocol, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]  # fsspec has no types
    except (ImportError, ValueError) as error:
        raise ClipcidError(
            f"{url} cannot be opened: {error}",
            "Install the package that fsspec asks for, or copy the data to a local folder.",
        ) from error


def fetch_error(url: str, error: Exception) -> ClipcidError:
    """Return the error for a URL that could not be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ClipcidError(
        f"{url} could not be fetched: {reason[:300]}", "Check the address, the network and the credentials."
    )
