"""The JSON objects of `embed`."""

from __future__ import annotations

import msgspec


class EmbedResult(msgspec.Struct):
    """What was embedded."""

    images: int
    skipped: dict[str, int]  # samples by reason
    images_per_second: float | None  # None where all were embedded earlier
    seconds: dict[str, float]  # by phase, the mean of the processes
    files: dict[str, str]


class EmbedPart(EmbedResult, kw_only=True):
    """What is embedded of a part; `images` and `skipped` are those of all its shards, whenever they were embedded."""

    part: str  # as ``2/8``
    shards: int  # of the part


class EmbedCost(msgspec.Struct):
    """What embedding would take, estimated from a few batches; of shards that are not embedded yet."""

    dry_run: bool
    shards: int
    images: int
    shards_done: int
    images_done: int
    bytes: int
    bytes_per_image: int
    seconds: dict[str, float]
    free_bytes: int  # of the disk of the output
    images_per_second: float  # of all processes, as it was timed
    decoded_per_second: float  # what all workers read and decode, or this process where it has none
    bound_by: str  # ``data`` where decoding is what takes the time, else ``model``
    host_memory_bytes: int  # of all processes of a host, with what waits in /dev/shm
    shared_memory_bytes: int


Embedded = EmbedResult | EmbedPart | EmbedCost
