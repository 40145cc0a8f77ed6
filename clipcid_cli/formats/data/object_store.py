"""Objects behind a URL that fsspec lists and writes, as of S3: whole files are sent there and fetched again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.remote import ask, open_remote
from clipcid_cli.formats.files import atomic_file, validate_size
from clipcid_cli.shown import redact

_PIECE = 2**23  # bytes held of an object that is fetched


@dataclasses.dataclass(frozen=True)
class ObjectStore:
    """The objects below a URL, by their names there."""

    url: str  # without a slash at its end

    def __str__(self) -> str:
        return redact(self.url)

    def below(self, folder: str) -> ObjectStore:
        return ObjectStore(f"{self.url}/{folder}")

    def names(self) -> set[str]:
        """Return the names of the objects and folders directly below; none where there is nothing."""

        def list_names(filesystem: Any, inner: str) -> list[str]:
            filesystem.invalidate_cache()  # others write there
            try:
                return [str(name) for name in filesystem.ls(inner, detail=False)]
            except FileNotFoundError:
                return []

        return {name.rstrip("/").rpartition("/")[2] for name in ask(self.url, list_names, done="listed")}

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return an object; a TooManyBytesError where it has more than `max_bytes`, of which no more is read."""
        url = f"{self.url}/{name}"
        data: bytes = ask(url, lambda filesystem, inner: filesystem.cat_file(inner, end=max_bytes + 1))
        validate_size(redact(url), len(data), max_bytes)
        return data

    def send(self, path: Path, name: str) -> None:
        """Write a file to an object, which stores show once they have all of it."""
        ask(f"{self.url}/{name}", lambda filesystem, inner: filesystem.put_file(str(path), inner), done="written")

    def fetch(self, name: str, path: Path, size: int) -> None:
        """Copy an object to a file, which is there whole or not at all; one of another size is refused."""
        with open_remote(f"{self.url}/{name}") as source, atomic_file(path) as file:
            # A byte more than there should be, and no further one.
            while piece := source.read(min(_PIECE, size + 1 - file.tell())):
                file.write(piece)
            if file.tell() != size:
                there = f"{file.tell():,}" if file.tell() < size else f"more than {size:,}"
                raise ClipcidError(
                    f"{self}/{name} has {there} bytes; its record says {size:,}.",
                    "Let the part that made it run again, once the record is removed.",
                )
