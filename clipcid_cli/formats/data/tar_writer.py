"""New shards from existing ones: the members of chosen samples, copied byte for byte with their headers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import IO, NamedTuple

from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.data.tars import Member, group_members, read_members

# An archive ends with two empty blocks and is padded to records of twenty, as tar programs write it.
_END = bytes(2 * 512)
_RECORD = 20 * 512
_COPY = 2**24


class Copied(NamedTuple):
    """The outcome of copying from a shard.

    Attributes:
        samples: Samples copied.
        read: Samples in the source.
    """

    samples: int
    read: int


def count_samples(source: Path) -> int:
    """Count the samples of a tar, including those without an image.

    Raises:
        ClipcidError: when it is damaged.
    """
    return sum(1 for _ in group_members(read_members(source)))


def copy_samples(source: Path, target: Path, keys: Set[str]) -> Copied:
    """Copy the samples with the given keys from one tar to another.

    Every byte of their members, headers and padding included, is the source's; nothing is decoded or renamed. Of a key that
    occurs twice the first sample is taken, as when reading.

    Args:
        target: The tar to write; it exists under its name only when complete.
        keys: Keys of samples as stored, without a shard's name.

    Returns:
        How many samples were copied, and how many the source has.

    Raises:
        ClipcidError: when the source is damaged, or the target cannot be written.
    """
    chosen = _Choice(keys)
    with source.open("rb") as reader, atomic_file(target) as writer:
        for start, end in _join_ranges(chosen.members(source)):
            _copy_range(reader, writer, start, end)
        position = writer.tell()
        writer.write(_END + bytes(-(position + len(_END)) % _RECORD))
    return Copied(len(chosen.copied), chosen.read)


class _Choice:
    """The members of chosen samples, and a count of all samples."""

    def __init__(self, keys: Set[str]) -> None:
        self._keys = keys
        self.copied: set[str] = set()
        self.read = 0

    def members(self, source: Path) -> Iterator[Member]:
        for key, members in group_members(read_members(source)):
            self.read += 1
            if key in self._keys and key not in self.copied:
                self.copied.add(key)
                yield from members


def _join_ranges(members: Iterator[Member]) -> Iterator[tuple[int, int]]:
    """Merge the byte ranges of adjacent members."""
    start = end = 0
    for member in members:
        if member.start != end:
            if end > start:
                yield start, end
            start = member.start
        end = member.end
    if end > start:
        yield start, end


def _copy_range(reader: IO[bytes], writer: IO[bytes], start: int, end: int) -> None:
    for offset in range(start, end, _COPY):
        data = os.pread(reader.fileno(), min(_COPY, end - offset), offset)
        # The padding of the last member may be missing in a tar without an end.
        writer.write(data.ljust(min(_COPY, end - offset), b"\0"))
