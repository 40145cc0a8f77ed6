"""Local copies of the shards that training reads in any order: those behind URLs, of commands, and parquet files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.index import DataIndex
from clipcid_cli.formats.data.shard_cache import FETCHED_AT_ONCE, ShardCache
from clipcid_cli.formats.user_cache import cache_folder
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.host import count_processes
from clipcid_cli.runtime.randomness import SHARDS_MIXED
from clipcid_cli.steps import reporting

# Each worker holds one copy for each shard of a group at most, those it read last: together the group that is read, and the
# one before, of which batches are still being made.
_SHARDS_HELD = 2 * SHARDS_MIXED


def cache_shards(dataset: Dataset, gigabytes: float) -> Dataset:
    """Return indexed data, read from local copies, of `gigabytes` at most, where shards are streamed."""
    index = dataset.index
    if index is None or not any(shard.is_streamed for shard in dataset.shards):
        return dataset
    fetched = min(FETCHED_AT_ONCE * count_processes(), SHARDS_MIXED)
    in_use = _SHARDS_HELD + fetched + 1  # which a worker fetches
    needed = sum(sorted((record.fingerprint.size for record in index.records), reverse=True)[:in_use])
    if needed > gigabytes * 1e9:
        raise ClipcidError(
            f"--cache-size {gigabytes:g} is too small: the {min(in_use, len(dataset.shards))} shards that are read, "
            f"fetched ahead or still in use at a time have up to {needed / 1e9:.3g} GB.",
            f"Give --cache-size {-(-needed // 10**7) / 100:g} or more, or make smaller shards.",
        )
    cache = ShardCache(cache_folder(), int(gigabytes * 1e9))
    return dataclasses.replace(dataset, index=dataclasses.replace(index, cache=cache))


def fetch_part_ahead(index: DataIndex, shards: Sequence[int], context: DistContext) -> None:
    """Copy this process's part of some shards to the cache in the background; the others of its host copy the rest."""
    index.fetch_ahead(shards[context.local_rank :: count_processes()])


def warn_of_copies(dataset: Dataset, context: DistContext) -> None:
    """Say what it costs that each host reads all shards behind URLs, and what to do about it."""
    if context.spans_hosts and any(is_remote(shard.file) for shard in dataset.shards):
        assert dataset.index is not None
        size = sum(record.fingerprint.size for record in dataset.index.records)
        volume = f", {size / 1e9:,.1f} GB" if size else ""  # that of commands is not known
        reporting.warn(
            f"Each host fetches all shards in every epoch{volume}: put CLIPCID_CACHE on a disk that the hosts share."
        )
