"""A folder of images, with captions in ``.txt`` files beside them or a folder for each class."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.cells import Origin
from clipcid_cli.formats.data.samples import IMAGE_SUFFIXES, natural_key
from clipcid_cli.formats.data.shard import Opened, ReadOptions
from clipcid_cli.formats.data.shard_files import FORMS, SHARD_SUFFIXES, refuse_compressed
from clipcid_cli.formats.data.slices import Images, ListedImages, cut


def open_folder(folder: str, options: ReadOptions) -> Opened:
    """Open a folder of images; an error where it has none."""
    opened = find_images(folder, options)
    if opened is None:
        refuse_compressed(folder, os.listdir(folder))
        inside = (path for path in Path(folder).glob("*/*") if path.suffix in SHARD_SUFFIXES)
        inner = sorted({str(path.parent) for path in inside}, key=natural_key)
        fix = f"Its folders {', '.join(inner[:6])} contain shards: give one of them." if inner else FORMS
        raise ClipcidError(f"{folder} contains no .tar shard and no image.", fix)
    return opened


def find_images(folder: str, options: ReadOptions) -> Opened | None:
    """Open the images of a folder; None where it has none."""
    images = FolderImages(folder, options)
    shards = cut(images)
    if not shards:
        return None
    if options.caption_keys:
        raise ClipcidError(
            f"--caption-key names members of tars or columns, and {folder} is a folder of images.",
            "Omit it: their captions are in a .txt beside each image.",
        )
    return Opened("images", shards, images.class_names)


@dataclasses.dataclass(frozen=True)
class FolderImages(Images):
    """The images of a folder."""

    @cached_property
    def origin(self) -> Origin:
        return Origin(self.source)

    def list_images(self) -> ListedImages:
        return _list_folder(self.source)

    def resolve(self, path: str) -> str:
        return os.path.join(self.source, path)

    def key_of(self, row: dict[str, Any]) -> bytes:
        name: bytes = row["path"]
        return name

    def files(self, index: int) -> Iterator[tuple[str, list[str]]]:
        """Yield the key of each image of a slice, and the paths of its files: the image, and its caption."""
        for row in self.rows(index):
            if not row["repeated"]:
                yield os.fsdecode(row["key"]), [os.fsdecode(row[name]) for name in ("path", "text") if row[name]]


def _list_folder(root: str) -> ListedImages:
    """List a folder of images, in natural order of their paths: captions are in ``.txt`` files next to them.

    Where every image is in a folder of its class, the classes are sorted as torchvision's ImageFolder sorts them, so that
    labels agree.
    """
    texts: dict[str, tuple[str, os.stat_result]] = {}
    images: list[tuple[str, int]] = []
    for path, stat in _walk(root):
        key, suffix = os.path.splitext(path)
        if suffix[1:].lower() in IMAGE_SUFFIXES:
            images.append((path, stat.st_size))
        elif suffix.lower() == ".txt":
            texts[key] = max(texts.get(key, ("", stat)), (path, stat))  # of `1.TXT` and `1.txt` the latter
    images.sort(key=lambda image: tuple(natural_key(part) for part in image[0].split("/")))
    class_names: tuple[str, ...] | None = None
    if images and all("/" in path for path, _ in images):
        class_names = tuple(sorted({path.partition("/")[0] for path, _ in images}))
    labels = {name: label for label, name in enumerate(class_names or ())}

    def rows() -> Iterator[dict[str, Any]]:
        for path, size in images:
            key = os.path.splitext(path)[0]
            row = {"key": os.fsencode(key), "path": os.fsencode(path), "size": size}
            if labels:
                row["classes"] = [labels[path.partition("/")[0]]]
            if key in texts:
                text, stat = texts[key]
                row |= {"text": os.fsencode(text), "text_size": stat.st_size, "text_time": stat.st_mtime_ns}
            yield row

    return ListedImages(rows(), class_names, _count_alone(texts, [path for path, _ in images]))


def _count_alone(texts: Iterable[str], images: Iterable[str]) -> int:
    """Count the texts, by their paths without the suffix, beside images of which none has their name.

    One in a folder without images describes something else, as a README.txt above folders of classes.
    """
    names = {os.path.splitext(path)[0] for path in images}
    folders = {os.path.dirname(path) for path in names}
    return sum(text not in names and os.path.dirname(text) in folders for text in texts)


def _walk(root: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield every file that is not hidden by its relative path; links to folders are followed, each folder visited once.

    Links to nothing and what else is no file are among them, to be counted where they are called as images.
    """
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
                try:
                    stat = entry.stat()
                except OSError:  # a link to nothing, or to itself
                    stat = entry.stat(follow_symlinks=False)
                if S_ISDIR(stat.st_mode):
                    pending.append(path)
                else:
                    yield path, stat
