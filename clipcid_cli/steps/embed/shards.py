"""The loop of `embed`: the shards that are missing, batch by batch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.data_index import stream_shard
from clipcid_cli.steps.embed.encoder import EmbedEncoder, recount_partners
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.encode import Batch, Encoded, encode, join, list_batches
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
    plan: EmbedPlan, encoder: EmbedEncoder, writer: EmbeddingWriter, machine: Machine, reporter: Reporter
) -> list[Timings]:
    """Embed the shards that are not finished, divided among the processes; return the timings of all."""
    total = len(plan.shards)

    def find_missing() -> tuple[list[int], float]:
        missing = [number for number in range(total) if writer.read_record(number) is None]
        return missing, plan.dataset.estimate_samples() * len(missing) / total

    missing, expected = machine.on_main(find_missing)
    if len(missing) < total:
        reporter.note(f"{total - len(missing)} of {total} shards are already embedded.")
    mine = missing[machine.rank :: machine.size]
    with reporter.progress("embed", expected, "texts" if plan.of_texts else "images") as progress:

        def advance(samples: int) -> None:
            progress.advance(samples * len(missing) / len(mine))  # the bar covers all processes

        return machine.gather(_embed(plan, encoder, writer, mine, advance))


def _embed(
    plan: EmbedPlan,
    encoder: EmbedEncoder,
    writer: EmbeddingWriter,
    shards: Sequence[int],
    advance: Callable[[int], None],
) -> Timings:
    """Embed shards, and write each one when it is complete."""
    timings, skipped, read = Timings(), Skips(), 0
    with_texts = encoder.decoder.tokenizer is not None

    def reject(sample: Sample) -> str | None:
        return "no_caption" if with_texts and not sample.captions else None

    start = time.perf_counter()
    stream = partial(stream_shard, plan.dataset)
    batches = list_batches(plan.dataset, shards, stream, encoder.decoder.batch_size, reject)
    parts = list[Encoded]()
    for batch, encoded in encode(batches, encoder.decoder, encoder, encoder.model.device, encoder.workers):
        if plan.of_texts and encoded.failures:  # no text may be missing
            text = int(encoded.samples[min(encoded.failures)].key)
            raise ClipcidError(
                f"The embedding of text {text + 1:,} is not finite.", "Try --precision fp32, or remove the text."
            )
        parts.append(encoded)
        advance(len(encoded.samples))
        timings.read += batch.waited
        if batch.read is None:
            continue
        clock = time.perf_counter()
        made = _make_rows(encoder, plan.dataset.shards[batch.shard], parts, batch)
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


def _make_rows(encoder: EmbedEncoder, shard: Shard, parts: Sequence[Encoded], last: Batch) -> ShardRows:
    """Join what was made of the batches of a shard, without what is not usable."""
    skipped = Skips()
    for part in parts:
        recount_partners(part)
        skipped.merge(part.count_skips(shard))
    skipped.merge(last.skipped)
    made = join([part.usable() for part in parts])
    rows = {kind: np.empty((0, *shape), kind.dtype) for kind, shape in encoder.shapes.items()}
    rows |= {kind: found.numpy() for kind, found in made.rows.items()}
    counts = [max(1, len(sample.captions)) for sample in made.samples]
    several = Kind.TEXTS in rows and max(counts, default=1) > 1
    if several:
        texts = rows[Kind.TEXTS]
        firsts = np.cumsum([0, *counts[:-1]])
        rows[Kind.TEXTS] = texts[firsts]
        rows[Kind.FURTHER] = np.delete(texts, firsts, axis=0)
    assert last.read is not None, "a shard's last batch"
    return ShardRows(
        read=last.read,
        skipped=skipped,
        laid_on_white=made.laid_on_white,
        keys=[sample.key for sample in made.samples],
        captions=[sample.captions[0] if sample.captions else "" for sample in made.samples],
        counts=counts if several else None,
        rows=rows,
    )
