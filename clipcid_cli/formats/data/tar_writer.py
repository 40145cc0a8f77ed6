"""New shards from existing ones: the members of chosen samples, copied byte for byte with their headers."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.data.tars import group_members, read_members

# An archive ends with two empty blocks and is padded to records of twenty, as tar programs write it.
_END = bytes(2 * 512)
_RECORD = 20 * 512
_COPY = 2**24


class Copied(NamedTuple):
    """How many samples a shard has, and how many of them were copied."""

    samples: int
    read: int


def count_samples(source: Path) -> int:
    """Count the samples of a tar, including those without an image."""
    return sum(1 for _ in group_members(read_members(source)))


def copy_samples(source: Path, target: Path, keys: Set[str]) -> Copied:
    """Copy the samples with the given keys from one tar to another.

    Every byte of their members, headers and padding included, is the source's; nothing is decoded or renamed. Of a key that
    occurs twice the first sample is taken, as when reading.

    Args:
        keys: Keys of samples as stored, without a shard's name.
    """
    read = 0
    copied = set[str]()
    ranges = list[tuple[int, int]]()
    for key, members in group_members(read_members(source)):
        read += 1
        if key not in keys or key in copied:
            continue
        copied.add(key)
        for member in members:
            start = member.start
            if ranges and ranges[-1][1] == start:  # adjacent members are copied together
                start = ranges.pop()[0]
            ranges.append((start, member.end))
    with source.open("rb") as reader, atomic_file(target) as writer:
        for start, end in ranges:
            for offset in range(start, end, _COPY):
                size = min(_COPY, end - offset)
                # The padding of the last member may be missing in a tar without an end.
                writer.write(os.pread(reader.fileno(), size, offset).ljust(size, b"\0"))
        writer.write(_END + bytes(-(writer.tell() + len(_END)) % _RECORD))
    return Copied(len(copied), read)
