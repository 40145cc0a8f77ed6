"""The loop of `embed`: the shards of a data set, one's files at a time."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_remote
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.loading import read_ahead
from clipcid_cli.steps.data_index import stream_shard
from clipcid_cli.steps.embed.encoder import Batch, Encoded, Encoder
from clipcid_cli.steps.reporting import Progress

# From this many samples on, too many unusable ones end the step before all data is read.
_EARLY_CHECK = 10_000


@dataclasses.dataclass
class Timings:
    """Where one process's time went, in seconds, how many samples it embedded, and how long all took together."""

    read: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    samples: int = 0
    elapsed: float = 0.0


def embed_shards(
    encoder: Encoder,
    dataset: Dataset,
    numbers: Sequence[int],
    writer: EmbeddingWriter,
    max_bad_fraction: float,
    progress: Progress,
    weight: float,
) -> Timings:
    """Embed some shards and write each one when it is complete.

    Batches never cross shards, so that a row's bits depend on its shard alone: not on which process embeds it, nor on what
    was done before a crash.

    Args:
        numbers: Numbers of the shards, in the order they are embedded.
        max_bad_fraction: Largest share of unusable samples.
        weight: Progress of one sample, on a bar that covers all processes.
    """
    timings, waited = Timings(), list[float]()
    skipped, read = Skips(), 0
    start = time.perf_counter()
    batches = _list_batches(encoder, dataset, numbers)
    if any(is_remote(dataset.shards[number].file) for number in numbers):
        batches = read_ahead(batches, max(2, encoder.workers))
    parts: list[Encoded] = []
    for encoded in encoder.encode(batches, waited):
        batch = encoded.batch
        parts.append(encoded)
        progress.advance(len(batch.samples) * weight)
        if batch.read is None:
            continue
        clock = time.perf_counter()
        made = _join(encoder, dataset.shards[batch.shard].name, parts, batch.read)
        writer.write(batch.shard, made)
        parts = []
        timings.samples += len(made.keys)
        timings.write += time.perf_counter() - clock
        skipped.merge(made.skipped)
        read += made.read
        if read >= _EARLY_CHECK:
            skipped.check(read, max_bad_fraction, dataset.spec)
    timings.read = sum(waited)
    timings.encode = time.perf_counter() - start - timings.read - timings.write
    return timings


def _list_batches(encoder: Encoder, dataset: Dataset, numbers: Sequence[int]) -> Iterator[Batch]:
    """List the batches of the shards; a shard without a sample has one empty batch, so that it is written as well."""
    for number in numbers:
        skipped, without_caption = Skips(), Skips()
        name = dataset.shards[number].name
        read, samples = 0, list[Sample]()
        for sample in stream_shard(dataset, number, skipped):
            read += 1
            if encoder.with_texts and not sample.captions:
                without_caption.add("no_caption", f"{name}: {sample.key}")
                continue
            if len(samples) == encoder.samples_at_once:
                yield Batch(number, samples)
                samples = []
            samples.append(sample)
        read += skipped.total
        skipped.merge(without_caption)
        yield Batch(number, samples, read, skipped)


def _join(encoder: Encoder, name: str, parts: Sequence[Encoded], read: int) -> ShardRows:
    """Join what was made of the batches of a shard, without what is not usable."""
    skipped, samples = Skips(), list[Sample]()
    rows = defaultdict[Kind, list[npt.NDArray[Any]]](list)
    for part in parts:
        kept = [row for row in range(len(part.batch.samples)) if row not in part.failures]
        samples += [part.batch.samples[row] for row in kept]
        for kind, found in part.take(kept).items():
            rows[kind].append(found)
        for row, reason in sorted(part.failures.items()):
            skipped.add(reason, f"{name}: {part.batch.samples[row].key}")
    skipped.merge(parts[-1].batch.skipped)
    counts = [max(1, len(sample.captions)) for sample in samples]
    shapes = encoder.shapes
    if encoder.with_texts and max(counts, default=1) > 1:
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
