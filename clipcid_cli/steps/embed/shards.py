"""The loop of `embed`: the shards of a data set, one's files at a time."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_remote
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRows
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.loading import read_ahead
from clipcid_cli.runtime.models.augment import PACKED_VIEW, PARTNER
from clipcid_cli.steps.data_index import stream_shard
from clipcid_cli.steps.embed.encoder import Batch, Encoded, Encoder
from clipcid_cli.steps.reporting import Progress

# From this many samples on, too many unusable ones end the step before all data is read.
_EARLY_CHECK = 10_000


@dataclasses.dataclass
class Timings:
    """Where one process's time went, in seconds, and how many samples it embedded."""

    read: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    samples: int = 0


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

    Raises:
        ClipcidError: when too many samples are unusable, a shard is damaged, or a worker ended.
    """
    unfinished: defaultdict[int, _Collected] = defaultdict(lambda: _Collected(encoder))
    timings, waited = Timings(), list[float]()
    skipped, read = Skips(), 0
    start = time.perf_counter()
    batches = _list_batches(encoder, dataset, numbers)
    if any(is_remote(dataset.shards[number].file) for number in numbers):
        batches = read_ahead(batches, max(2, encoder.workers))
    for encoded in encoder.encode(batches, waited):
        batch = encoded.batch
        shard = unfinished[batch.shard]
        shard.add(encoded, dataset.shards[batch.shard].name)
        progress.advance(len(batch.samples) * weight)
        if batch.read is None:
            continue
        clock = time.perf_counter()
        del unfinished[batch.shard]
        made = shard.join(batch)
        writer.write(batch.shard, made)
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


class _Collected:
    """The rows of a shard, of which some batches are still to come."""

    def __init__(self, encoder: Encoder) -> None:
        self._shapes = encoder.shapes
        self._width = encoder.model.info.embed_dim
        self._rows: defaultdict[Kind, list[npt.NDArray[np.floating]]] = defaultdict(list)
        self._samples: list[Sample] = []
        self._skipped = Skips()
        self._laid_on_white = 0

    def add(self, encoded: Encoded, shard: str) -> None:
        """Append the usable rows of a batch.

        Args:
            shard: The shard's name.
        """
        samples = encoded.batch.samples
        self._laid_on_white += encoded.laid_on_white
        for row, reason in sorted(encoded.failures.items()):
            self._skipped.add(reason, f"{shard}: {samples[row].key}")
        kept = [row for row in range(len(samples)) if row not in encoded.failures]
        self._samples += [samples[row] for row in kept]
        for kind, rows in encoded.rows.items():
            if kind is Kind.FURTHER:
                self._rows[kind].append(rows[np.isin(encoded.owners, kept)])
            elif kind is Kind.VIEW_PARAMS:
                self._rows[kind].append(_renumber_partners(rows, kept))
            else:
                self._rows[kind].append(rows[kept])

    def join(self, last: Batch) -> ShardRows:
        """Return all rows, of each kind as one array."""
        counts = [max(1, len(sample.captions)) for sample in self._samples]
        shapes = self._shapes | (
            {Kind.FURTHER: (self._width,)} if Kind.TEXTS in self._shapes and max(counts, default=1) > 1 else {}
        )
        self._skipped.merge(last.skipped)
        assert last.read is not None
        return ShardRows(
            read=last.read,
            skipped=self._skipped,
            laid_on_white=self._laid_on_white,
            keys=[sample.key for sample in self._samples],
            captions=[sample.captions[0] if sample.captions else "" for sample in self._samples],
            counts=counts if Kind.FURTHER in shapes else None,
            rows={
                kind: np.concatenate([np.empty((0, *shape), kind.dtype), *self._rows[kind]])
                for kind, shape in shapes.items()
            },
        )


def _renumber_partners(params: npt.NDArray[np.floating], kept: Sequence[int]) -> npt.NDArray[np.floating]:
    """Take the parameters of the kept samples [n, V, P], with the places of partners counted among these.

    A partner that is not kept has no row: its place is NaN.
    """
    taken = params[kept]
    if params.shape[2] > PACKED_VIEW:
        places = np.full(len(params), np.nan)
        places[kept] = np.arange(len(kept))
        partners = np.array(kept, dtype=np.int64)[:, None] + taken[:, :, PARTNER].astype(np.int64)
        taken[:, :, PARTNER] = places[partners] - np.arange(len(kept))[:, None]
    return taken
