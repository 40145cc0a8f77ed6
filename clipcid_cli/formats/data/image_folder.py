"""A folder of images: captions in ``.txt`` files beside them, or one folder per class."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clipcid_cli.formats.data.samples import IMAGE_SUFFIXES, Location, Sample, natural_key, relative_key
from clipcid_cli.formats.skips import Skips

VIRTUAL_SHARD = 10_000
"""Samples in a shard of data that has no shards of its own."""


class _Entry(NamedTuple):
    path: str  # relative to the root
    size: int  # bytes
    has_caption: bool
    label: int | None
    repeated: bool  # another image before it has the same key


@dataclasses.dataclass(frozen=True)
class FolderShard:
    """A slice of an image folder.

    Attributes:
        name: Number of the slice, five digits.
        prefix_keys: Whether keys begin with the shard's name.
    """

    name: str
    root: str
    entries: tuple[_Entry, ...]
    prefix_keys: bool = False

    def samples(self, skips: Skips | None = None) -> list[Sample]:
        """List the slice's samples; images that share their name up to the suffix are one key, the first is kept."""
        skips = skips if skips is not None else Skips()
        found = []
        for entry in self.entries:
            key = relative_key(Path(entry.path))
            if entry.repeated:
                skips.add("duplicate_key", entry.path)
                continue
            captions: tuple[str, ...] = ()
            if entry.has_caption:
                text = Path(self.root, key + ".txt").read_text(encoding="utf-8", errors="replace").strip()
                captions = (text,) if text else ()
            found.append(
                Sample(
                    key=f"{self.name}/{key}" if self.prefix_keys else key,
                    image=Location(os.path.join(self.root, entry.path)),
                    captions=captions,
                    label=entry.label,
                )
            )
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Describe the slice: bytes of its images, and a hash of their names and sizes."""
        text = "\n".join(f"{entry.path}\t{entry.size}\t{entry.has_caption}" for entry in self.entries)
        digest = hashlib.blake2b(text.encode("utf-8", errors="surrogateescape"), digest_size=16).hexdigest()
        size = sum(entry.size for entry in self.entries)
        return {"path": f"{self.root}#{self.name}", "size": size, "hash": f"blake2b-names:{digest}"}


def read_image_folder(root: Path, *, prefix_keys: bool) -> tuple[tuple[FolderShard, ...], tuple[str, ...] | None]:
    """List a folder of images, in natural order of their paths.

    Args:
        root: The folder; folders within it are read too, hidden files are not.
        prefix_keys: Whether keys begin with the shard's name.

    Returns:
        Slices of `VIRTUAL_SHARD` images, none when there are no images; and the names of the classes when every image
        lies in a folder of its class (sorted as torchvision's ImageFolder sorts them, so that labels agree), else None.
    """
    texts: set[str] = set()
    images: list[tuple[str, int]] = []
    for path, size in _walk(root):
        suffix = path.rpartition(".")[2].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append((path, size))
        elif suffix == "txt":
            texts.add(path[: -len(".txt")])
    images.sort(key=lambda image: tuple(natural_key(part) for part in image[0].split("/")))
    classes: tuple[str, ...] | None = None
    if images and all("/" in path for path, _ in images):
        classes = tuple(sorted({path.partition("/")[0] for path, _ in images}))
    labels = {name: number for number, name in enumerate(classes or ())}
    entries, seen = [], set()
    for path, size in images:
        key = relative_key(Path(path))
        entries.append(_Entry(path, size, key in texts, labels.get(path.partition("/")[0]), key in seen))
        seen.add(key)
    shards = tuple(
        FolderShard(
            f"{start // VIRTUAL_SHARD:05d}", str(root), tuple(entries[start : start + VIRTUAL_SHARD]), prefix_keys
        )
        for start in range(0, len(entries), VIRTUAL_SHARD)
    )
    return shards, classes


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Yield relative path and size of every file; links to folders are followed, each folder once."""
    visited: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        identity = os.stat(os.path.join(root, folder))
        if (identity.st_dev, identity.st_ino) in visited:
            continue
        visited.add((identity.st_dev, identity.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(path)
                elif entry.is_file():
                    yield path, entry.stat().st_size
