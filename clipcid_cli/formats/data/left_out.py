"""What lies in a folder of data beside what is read of it: lists, and images or shards of another kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

from clipcid_cli.formats.data.samples import IMAGE_SUFFIXES, natural_key

_LISTS = ("csv", "tsv", "parquet")
_SHARDS = {"webdataset": "tar", "parquet": "parquet"}
_OF_FOLDERS = {*IMAGE_SUFFIXES, "tar"}
# A folder of data shows what it holds at once; a stranger's may hold any number of folders and files.
_MOST_FOLDERS = 1_000
_MOST_ENTRIES = 100
_FOLDERS = "folders of images or tars"


def find_lists(folder: str, kind: str) -> list[str]:
    """Return the paths of files in a folder, read as data of a kind, that are called as lists are, in natural order.

    Not those that are shards, or describe the samples of a tar that is called so.
    """
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    tars = {stem for stem, suffix in map(_split, names) if suffix == "tar"}
    suffixes = {*_LISTS} - {_SHARDS.get(kind)}
    lists = [name for name in names if _split(name)[1] in suffixes and _split(name)[0] not in tars]
    return [os.path.join(folder, name) for name in sorted(lists, key=natural_key)]


def describe_left_out(folder: str, kind: str) -> str:
    """Say what a folder, read as data of a kind, holds that is not read; empty where there is nothing.

    Names are looked at, no content. A parquet file called as a tar describes that tar's samples, as img2dataset's do.
    """
    names = [_split(name) for name in os.listdir(folder) if not name.startswith(".")]
    read = _SHARDS.get(kind)
    shards = {stem for stem, suffix in names if suffix == read}
    counts = Counter(suffix for stem, suffix in names if stem not in shards)
    others = {f".{suffix}": counts[suffix] for suffix in _LISTS}
    taken = "images"
    if read is not None:
        taken = f".{read} files ({len(shards):,})"
        others["images"] = sum(counts[suffix] for suffix in IMAGE_SUFFIXES)
        others[_FOLDERS] = sum(map(_has_data, islice(_list_folders(folder), _MOST_FOLDERS)))
    counted = {what: f"{count:,}" for what, count in others.items() if count}
    if others.get(_FOLDERS) == _MOST_FOLDERS:
        counted[_FOLDERS] += " or more"
    unread = ", ".join(f"{what}: {count}" for what, count in counted.items())
    if not unread:
        return ""
    read_alone = f"{folder}: its {taken} are read, and not what is beside them ({unread})."
    return f"{read_alone} To read one of these, give it as the data."


def _split(name: str) -> tuple[str, str]:
    """Return a file's name without its suffix, and that in small letters."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix[1:].lower()


def _list_folders(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _has_data(folder: str) -> bool:
    with suppress(OSError), os.scandir(folder) as entries:  # one that may not be listed
        return any(_split(entry.name)[1] in _OF_FOLDERS for entry in islice(entries, _MOST_ENTRIES))
    return False
