"""The loop of `embed`: the shards that are missing, batch by batch."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_remote
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.pipeline import read_ahead
from clipcid_cli.steps.data_index import stream_shard
from clipcid_cli.steps.embed.encoder import Batch, Encoder
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.embed.prepare import Preparation
from clipcid_cli.steps.reporting import Reporter

# From this many samples on, too many unusable ones end the step before all data is read.
_EARLY_CHECK = 10_000


@dataclasses.dataclass
class Timings:
    """Where one process's time went, in seconds, and how many samples it embedded."""

    read: float = 0.0
    write: float = 0.0
    elapsed: float = 0.0
    samples: int = 0

    @property
    def encode(self) -> float:
        """Time that was spent neither waiting for workers nor writing."""
        return self.elapsed - self.read - self.write


def embed_missing(
    plan: EmbedPlan, encoder: Encoder, writer: EmbeddingWriter, machine: Machine, reporter: Reporter
) -> list[Timings]:
    """Embed the shards that are not finished, divided among the processes; return the timings of all.

    Batches never cross shards, so that a row's bits depend on its shard alone: not on which process embeds it, nor on what
    was done before a crash.
    """
    shards = range(len(plan.shards))
    missing = machine.on_main(lambda: [number for number in shards if writer.read_record(number) is None])
    if len(missing) < len(shards):
        reporter.note(f"{len(shards) - len(missing)} of {len(shards)} shards are already embedded.")
    expected = machine.on_main(plan.dataset.estimate_samples) * len(missing) / len(shards)
    mine = missing[machine.rank :: machine.size]
    weight = len(missing) / max(1, len(mine))  # the bar covers all processes
    with reporter.progress("embed", expected, "texts" if plan.of_texts else "images") as progress:
        timings = _embed(plan, encoder, writer, mine, lambda samples: progress.advance(samples * weight))
    return machine.gather(timings)


def _embed(
    plan: EmbedPlan,
    encoder: Encoder,
    writer: EmbeddingWriter,
    numbers: Sequence[int],
    advance: Callable[[int], None],
) -> Timings:
    """Embed shards, and write each one when it is complete."""
    timings = Timings()
    skipped = Skips()
    read = 0
    start = time.perf_counter()
    batches = _list_batches(plan.dataset, encoder.preparation, numbers)
    if any(is_remote(plan.dataset.shards[number].file) for number in numbers):
        batches = read_ahead(batches, max(2, encoder.workers))
    parts = list[Batch]()
    for batch in encoder.encode(batches):
        if plan.of_texts and batch.failures:  # no text may be missing
            text = int(batch.samples[min(batch.failures)].key)
            raise ClipcidError(
                f"The embedding of text {text + 1:,} is not finite.", "Try --precision fp32, or remove the text."
            )
        parts.append(batch)
        advance(len(batch.samples))
        timings.read += batch.waited
        if batch.read is None:
            continue
        clock = time.perf_counter()
        made = _join(encoder, plan.dataset.shards[batch.shard].name, parts, batch.read)
        writer.write(batch.shard, made)
        parts = []
        timings.samples += len(made.keys)
        timings.write += time.perf_counter() - clock
        skipped.merge(made.skipped)
        read += made.read
        if read >= _EARLY_CHECK:
            skipped.check(read, plan.max_bad_fraction, plan.dataset.spec)
    timings.elapsed = time.perf_counter() - start
    return timings


def _list_batches(dataset: Dataset, preparation: Preparation, numbers: Sequence[int]) -> Iterator[Batch]:
    """List the batches of the shards; a shard without a sample has one empty batch, so that it is written as well."""
    for number in numbers:
        skipped = Skips()
        without_caption = Skips()
        name = dataset.shards[number].name
        read = 0
        samples = list[Sample]()
        for sample in stream_shard(dataset, number, skipped):
            read += 1
            if preparation.with_texts and not sample.captions:
                without_caption.add("no_caption", f"{name}: {sample.key}")
                continue
            if len(samples) == preparation.batch_size:
                yield Batch(number, samples)
                samples = []
            samples.append(sample)
        read += skipped.total
        skipped.merge(without_caption)
        yield Batch(number, samples, read, skipped)


def _join(encoder: Encoder, name: str, parts: Sequence[Batch], read: int) -> ShardRows:
    """Join what was made of the batches of a shard, without what is not usable."""
    skipped = Skips()
    samples = list[Sample]()
    rows = defaultdict[Kind, list[npt.NDArray[Any]]](list)
    for part in parts:
        kept = [row for row in range(len(part.samples)) if row not in part.failures]
        samples += [part.samples[row] for row in kept]
        for kind, found in part.take(kept).items():
            rows[kind].append(found)
        for row, reason in sorted(part.failures.items()):
            skipped.add(reason, f"{name}: {part.samples[row].key}")
    skipped.merge(parts[-1].skipped)
    counts = [max(1, len(sample.captions)) for sample in samples]
    shapes = encoder.shapes
    if Kind.TEXTS in shapes and max(counts, default=1) > 1:
        shapes[Kind.FURTHER] = shapes[Kind.TEXTS]
    return ShardRows(
        read=read,
        skipped=skipped,
        laid_on_white=sum(part.laid_on_white for part in parts),
        keys=[sample.key for sample in samples],
        captions=[sample.captions[0] if sample.captions else "" for sample in samples],
        counts=counts if Kind.FURTHER in shapes else None,
        rows={kind: np.concatenate([np.empty((0, *shape), kind.dtype), *rows[kind]]) for kind, shape in shapes.items()},
    )
