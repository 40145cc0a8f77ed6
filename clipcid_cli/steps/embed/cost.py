"""What embedding would cost: a dry run embeds the first batches of the data and writes nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import islice

import torch

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.pipeline import estimate_host_memory, threads_for_batches
from clipcid_cli.steps.embed.encoder import EmbedEncoder
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.encode import encode, list_batches

# Batches of each thread after the first, which also allocates and starts the workers.
_TIMED = 3


def estimate_cost(encoder: EmbedEncoder, plan: EmbedPlan, context: DistContext) -> EmbedCost:
    """Say what embedding takes of disk and memory, and how long at the pace of the first batches."""
    samples = context.on_rank0(plan.dataset.estimate_samples)
    batch = encoder.decoder(())
    item = sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
    memory = context.on_all(lambda: estimate_host_memory(item, item, encoder.workers))
    seconds = context.on_all(lambda: _time_sample(encoder, plan)) * samples / context.size
    folder = plan.folder.absolute()
    disk = next(place for place in (folder, *folder.parents) if place.exists())
    return EmbedCost(
        dry_run=True,
        shards=len(plan.shards),
        images=samples,
        bytes=samples * encoder.bytes_per_sample,
        bytes_per_image=encoder.bytes_per_sample,
        seconds={"encode": round(seconds, 1)},
        free_bytes=shutil.disk_usage(disk).free,
        host_memory_bytes=memory.total,
        shared_memory_bytes=memory.shared,
    )


def _time_sample(encoder: EmbedEncoder, plan: EmbedPlan) -> float:
    """Read, decode and encode a few batches, and return the seconds of a sample."""
    device = encoder.model.device
    threads = threads_for_batches(device)
    shards = plan.dataset.shards

    def stream(shard_index: int, skips: Skips) -> Iterator[Sample]:
        return shards[shard_index].stream(skips)

    batches = list_batches(plan.dataset, range(len(shards)), stream, encoder.samples_at_once, plan.reject)
    few = islice(batches, threads * (1 + _TIMED))
    began = time.perf_counter()
    ends = list[tuple[float, int]]()
    for _, encoded in encode(few, encoder.decoder, encoder, device, encoder.workers):
        ends.append((time.perf_counter(), len(encoded.samples)))
    if len(ends) > threads:  # the first of each thread are no measure
        began = ends[threads - 1][0]
        ends = ends[threads:]
    return (ends[-1][0] - began) / max(1, sum(size for _, size in ends))
