"""A folder of images: captions in ``.txt`` files next to them, or one folder per class."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clipcid_cli.formats.data.samples import IMAGE_SUFFIXES, Location, Sample, natural_key, relative_key
from clipcid_cli.formats.data.virtual_shard import VirtualShard, slice_rows
from clipcid_cli.formats.reading import read_regular


class _Entry(NamedTuple):
    path: str  # relative to the root
    size: int  # bytes
    caption_suffix: str  # `.txt` as it is written; empty where there is no caption
    label: int | None
    repeated: bool  # another image before it has the same key


@dataclasses.dataclass(frozen=True)
class FolderShard(VirtualShard[_Entry]):
    """A slice of an image folder. Images whose names differ in the suffix only have the same key; the first is kept."""

    def fingerprint(self) -> dict[str, Any]:
        """Describe the slice: bytes of its images, and a hash of their names and sizes and of what the captions say."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            captions = self._captions(row)  # not their sizes: an edited caption often has the size it had
            digest.update(f"{row.path}\t{row.size}\t{captions}\n".encode("utf-8", errors="surrogateescape"))
        size = sum(row.size for row in self.rows)
        return {"path": f"{self.source}#{self.name}", "size": size, "hash": f"blake2b-names:{digest.hexdigest()}"}

    def stamp(self) -> tuple[int, int]:
        """Return the bytes of the images and a hash of the slice, with sizes and times of the captions' files."""
        digest = hashlib.blake2b(digest_size=7)
        for row in self.rows:
            caption = None
            if row.caption_suffix:
                with contextlib.suppress(OSError):  # a caption that is gone changes the stamp as well
                    found = os.stat(self._caption_path(row))
                    caption = found.st_size, found.st_mtime_ns
            text = f"{row.path}\t{row.size}\t{row.repeated}\t{row.caption_suffix}\t{caption}\n"
            digest.update(text.encode("utf-8", errors="surrogateescape"))
        return sum(row.size for row in self.rows), int.from_bytes(digest.digest(), "big")

    def _caption_path(self, row: _Entry) -> Path:
        return Path(self.source, relative_key(Path(row.path)) + row.caption_suffix)

    def _label(self, row: _Entry) -> str:
        return row.path

    def _sample(self, row: _Entry) -> Sample:
        location = Location(os.path.join(self.source, row.path))
        return Sample(relative_key(Path(row.path)), location, self._captions(row), row.label)

    def _captions(self, row: _Entry) -> tuple[str, ...]:
        text = ""
        if row.caption_suffix:
            with contextlib.suppress(OSError):  # a caption that cannot be read is a missing one, and counted as such
                text = read_regular(self._caption_path(row)).decode("utf-8", errors="replace").strip()
        return (text,) if text else ()


def read_image_folder(root: Path, *, prefix_keys: bool) -> tuple[tuple[FolderShard, ...], tuple[str, ...] | None]:
    """List a folder of images, in natural order of their paths.

    Args:
        root: The folder; folders within it are included, hidden files are not.
        prefix_keys: Whether keys begin with the shard's name.

    Returns:
        Slices of the images, none when there are no images; and the names of the classes when every image
        is in a folder of its class (sorted as torchvision's ImageFolder sorts them, so that labels agree), else None.
    """
    texts: dict[str, str] = {}
    images: list[tuple[str, int]] = []
    for path, size in _walk(root):
        suffix = path.rpartition(".")[2].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append((path, size))
        elif suffix == "txt":
            key, suffix = os.path.splitext(path)
            texts[key] = max(suffix, texts.get(key, ""))  # of `1.TXT` and `1.txt` the latter
    images.sort(key=lambda image: tuple(natural_key(part) for part in image[0].split("/")))
    classes: tuple[str, ...] | None = None
    if images and all("/" in path for path, _ in images):
        classes = tuple(sorted({path.partition("/")[0] for path, _ in images}))
    labels = {name: number for number, name in enumerate(classes or ())}
    keys = [relative_key(Path(path)) for path, _ in images]
    seen, entries = set[str](), list[_Entry]()
    for (path, size), key in zip(images, keys, strict=True):
        entries.append(_Entry(path, size, texts.get(key, ""), labels.get(path.partition("/")[0]), key in seen))
        seen.add(key)
    return tuple(FolderShard(name, str(root), rows, prefix_keys) for name, rows in slice_rows(entries)), classes


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Yield relative path and size of every file; links to folders are followed, and each folder is visited once."""
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
