"""Slices of data that has no shards of its own: a folder of images or a list."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.skips import Skips

VIRTUAL_SHARD = 10_000
"""Samples in a slice."""


class Row(Protocol):
    """What is known of a sample before its shard is read."""

    @property
    def path(self) -> str:
        """Path or URL of the image; empty where a list names none."""

    @property
    def repeated(self) -> bool:
        """Whether an earlier row of the whole data set has the same key."""


RowT = TypeVar("RowT", bound=Row)


@dataclasses.dataclass(frozen=True)
class VirtualShard(ABC, Generic[RowT]):
    """A slice of rows, read as a shard.

    Attributes:
        name: Number of the slice, five digits.
        source: The folder or the list.
        prefix_keys: Whether keys begin with the shard's name.
    """

    name: str
    source: str
    rows: tuple[RowT, ...]
    prefix_keys: bool = False

    def samples(self, skips: Skips | None = None) -> list[Sample]:
        """List the slice's samples; rows without an image, or with a key that an earlier row has, are counted."""
        return list(self.stream(skips))

    def stream(self, skips: Skips | None = None) -> Iterator[Sample]:
        """Yield what `samples` lists."""
        skips = skips if skips is not None else Skips()
        for row in self.rows:
            if not row.path:
                skips.add("no_image", self._label(row))
            elif row.repeated:
                skips.add("duplicate_key", self._label(row))
            else:
                sample = self._sample(row)
                yield dataclasses.replace(sample, key=f"{self.name}/{sample.key}") if self.prefix_keys else sample

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Describe the slice for a sidecar: ``path``, ``size``, ``hash``."""

    @property
    def file(self) -> str:
        """Empty: each image is a file of its own."""
        return ""

    def stamp(self) -> tuple[int, int]:
        """Return the size and a hash of the slice."""
        fingerprint = self.fingerprint()
        digest = hashlib.blake2b(fingerprint["hash"].encode(), digest_size=7)
        digest.update(bytes(row.repeated for row in self.rows))
        return fingerprint["size"], int.from_bytes(digest.digest(), "big")

    def split_captions(self, text: bytes) -> tuple[str, ...]:
        """Return the text as one caption."""
        return (text.decode("utf-8", errors="replace").strip(),)

    @abstractmethod
    def _label(self, row: RowT) -> str:
        """Return what a user would look for to find a skipped row."""

    @abstractmethod
    def _sample(self, row: RowT) -> Sample:
        """Return the row as a sample with its own key."""


def slice_rows(rows: Sequence[RowT]) -> Iterator[tuple[str, tuple[RowT, ...]]]:
    """Yield the name and the rows of each slice of `VIRTUAL_SHARD`."""
    for start in range(0, len(rows), VIRTUAL_SHARD):
        yield f"{start // VIRTUAL_SHARD:05d}", tuple(rows[start : start + VIRTUAL_SHARD])
