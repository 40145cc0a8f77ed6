"""What embedding would cost: a dry run embeds the first batches of the data and writes nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from typing import NamedTuple

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.manifest import MANIFEST, read_manifest
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.pipeline import threads_for_batches
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps import reporting
from clipcid_cli.steps.embed.encoder import EmbedEncoder
from clipcid_cli.steps.embed.memory import validate_memory
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.encode import encode, list_batches

# Batches of each thread after the first, which also allocates and starts the workers.
_TIMED = 3
_DECODED = 32  # samples that are decoded alone


def estimate_cost(
    encoder: EmbedEncoder, plan: EmbedPlan, output: Output[EmbedSidecar], context: DistContext
) -> EmbedCost:
    """Say what embedding takes of disk and memory, and how long at the pace of the first batches and of decoding.

    Args:
        output: What is there already, of which a run embeds nothing again.
    """
    left = context.on_rank0(_count_left, plan, output)
    samples = left.samples
    memory = context.on_all(validate_memory, plan, encoder, samples)
    paces = context.gather(context.on_all(_time_batches, encoder, plan))
    workers = encoder.workers
    speed = sum(1 / pace.of_run(workers) for pace in paces)
    supply = sum(max(1, workers) / pace.decoding for pace in paces)
    is_bound_by_data = any(pace.is_bound_by_data(workers) for pace in paces)
    more = " More cores and --workers decode more." if is_bound_by_data else ""
    reporting.note(f"Decoding alone: about {supply:,.0f} images/s.{more}")
    folder = plan.folder.absolute()
    disk = next(place for place in (folder, *folder.parents) if place.exists())
    return EmbedCost(
        dry_run=True,
        shards=left.shards,
        images=samples,
        shards_done=len(plan.shards) - left.shards,
        images_done=left.done,
        bytes=samples * encoder.bytes_per_sample,
        bytes_per_image=encoder.bytes_per_sample,
        seconds={"encode": round(samples / speed, 1)},
        free_bytes=shutil.disk_usage(disk).free,
        images_per_second=round(speed, 1),
        decoded_per_second=round(supply, 1),
        bound_by="data" if is_bound_by_data else "model",
        host_memory_bytes=memory.total,
        shared_memory_bytes=memory.shared,
    )


class _Left(NamedTuple):
    """What a run has yet to embed."""

    shards: int
    samples: int
    done: int  # samples that are embedded


def _count_left(plan: EmbedPlan, output: Output[EmbedSidecar]) -> _Left:
    """Count shards and samples that neither a killed run nor finished embeddings of the same shards have."""
    finished = []
    if (output.folder / MANIFEST).exists():
        with suppress(ClipcidError):  # it is damaged: all shards are embedded again
            finished = read_manifest(output.folder, "")
    work = output.begun or output.work_top
    deciding = plan.decide_rows(output.spec.settings)
    done = EmbeddingWriter(work, deciding, plan.shards, plan.dataset.keys).estimate_done(finished)
    total = len(plan.shards)
    samples = plan.dataset.estimate_samples()
    if plan.dataset.index is None:
        samples_done = round(samples * len(done) / total)
    else:
        samples_done = int(plan.dataset.index.sizes[done].sum())
    if done:
        reporting.note(f"{len(done):,} of {total:,} shards are already embedded.")
    return _Left(total - len(done), samples - samples_done, samples_done)


class EmbedPace(NamedTuple):
    """Seconds of a sample."""

    batches: float  # of the first batches, most of which workers had decoded before they were timed
    decoding: float  # to read and decode it on one core

    def of_run(self, workers: int) -> float:
        """Return the seconds of a sample of a run: those of what is slower, decoding by so many workers or the model."""
        return max(self.batches, self.decoding / workers) if workers else self.batches

    def is_bound_by_data(self, workers: int) -> bool:
        """Tell whether a run waits for decoding; without workers, whether that takes most of the time."""
        return self.decoding / workers > self.batches if workers else self.decoding > self.batches / 2


def _time_batches(encoder: EmbedEncoder, plan: EmbedPlan) -> EmbedPace:
    """Read, decode and encode a few batches."""
    device = encoder.model.device
    threads = threads_for_batches(device)
    shards = plan.dataset.shards

    def stream(shard_index: int, skips: Skips) -> Iterator[Sample]:
        return shards[shard_index].stream(skips)

    batches = list_batches(plan.dataset, range(len(shards)), stream, encoder.samples_at_once, plan.reject)
    few = islice(batches, threads * (1 + _TIMED))
    first = next(few)
    decoding = time_trial(partial(encoder.decoder, first.samples[:_DECODED]))
    began = time.perf_counter()
    ends = list[tuple[float, int]]()
    for _, encoded in encode(chain([first], few), encoder.decoder, encoder, device, encoder.workers):
        ends.append((time.perf_counter(), len(encoded.samples)))
    if len(ends) > threads:  # the first of each thread are no measure
        began = ends[threads - 1][0]
        ends = ends[threads:]
    seconds = (ends[-1][0] - began) / max(1, sum(size for _, size in ends))
    return EmbedPace(seconds, decoding.seconds / max(1, len(first.samples[:_DECODED])))
