"""Bytes of samples that are no part of a file on this disk: behind URLs, in parquet files, and in local copies of either."""

from __future__ import annotations

from functools import lru_cache

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_pipe, is_url
from clipcid_cli.formats.data.image_column import read_copied, read_row
from clipcid_cli.formats.data.remote import RemoteImageError, fetch_listed, read_remote
from clipcid_cli.formats.data.samples import ByteRange, Handle
from clipcid_cli.formats.data.shard_cache import ShardCopy
from clipcid_cli.formats.files import read_part

# Copies a process holds, so that they are not removed: one for each shard whose samples are shuffled together.
_OPEN_COPIES = 16


def read_distant(place: ByteRange) -> bytes:
    """Read the bytes of a place; see `ByteRange.read`."""
    if place.copy is not None:
        return _read_copy(place, place.copy)
    if place.column is not None:
        return read_row(place.path, place.column, place.offset)
    if is_pipe(place.path):
        raise OSError(f"the output of {place.path} has passed")
    assert is_url(place.path), "a file of this disk is read as it is"
    if place.size is None:
        return _read_whole(place)
    return read_remote(place.path, place.offset, place.size)


def close_copies() -> None:
    """Close the copies of shards that this process holds open, so that they can make room for others."""
    _open_copy.cache_clear()


def _read_copy(place: ByteRange, copy: ShardCopy) -> bytes:
    descriptor = _open_copy(copy).fd
    if place.column is not None:
        return read_copied(descriptor, str(copy.local), place.offset)
    assert place.size is not None, "part of a file"
    return read_part(descriptor, place.path, place.offset, place.size)


def _read_whole(place: ByteRange) -> bytes:
    try:
        return fetch_listed(place.path, place.max_bytes, None if place.origin is None else place.origin.source)
    except ClipcidError as error:  # one image of a list, not a shard
        raise RemoteImageError(error) from error


@lru_cache(maxsize=_OPEN_COPIES)
def _open_copy(copy: ShardCopy) -> Handle:
    return Handle(copy.open())
