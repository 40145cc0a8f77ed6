"""The loop of `embed`: shards to rows of float16, one shard's files at a time."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_remote
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRecord
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.loading import load_batches, read_ahead
from clipcid_cli.runtime.models.augment import ViewPixels, apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.runtime.threads import map_threads, threads_for_batches
from clipcid_cli.steps.data_index import stream_shard
from clipcid_cli.steps.embed.batches import EmbedBatch, Listing, Preparation, PreparedEmbedBatch
from clipcid_cli.steps.embed.shard_rows import BatchRows, PendingShard
from clipcid_cli.steps.embed.views import ViewMaker, Views
from clipcid_cli.steps.reporting import Progress

# From this many samples on, too many unusable ones end the step before all data is read.
_EARLY_CHECK = 10_000


@dataclasses.dataclass
class Timings:
    """Where one process's time went, in seconds, and how many images it embedded."""

    read: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    images: int = 0


@dataclasses.dataclass(frozen=True)
class ShardEmbedder:
    """Embeds shards of a data set and writes them.

    Batches never cross shards and are padded to one size, so that a row's bits depend on its shard alone: not on which
    process embeds it, nor on what was done before a crash.

    Attributes:
        precision: Number format of its products.
        with_texts: Whether captions are embedded too; samples without one are then left out and counted.
        fast_decode: Whether JPEGs are decoded at a reduced size.
        max_bad_fraction: Largest share of unusable samples.
        views: Augmented views to embed too; None for none.
        text_variants: Variants of the captions to embed too; None for none.
    """

    model: ClipModel
    precision: Precision
    dataset: Dataset
    with_texts: bool
    fast_decode: bool
    batch_size: int
    workers: int
    max_bad_fraction: float
    views: Views | None = None
    text_variants: TextVariants | None = None

    @property
    def samples_at_once(self) -> int:
        """Samples a batch, B: with V views each makes 1 + V pictures, so that a batch's memory stays what it is."""
        return self.batch_size if self.views is None else max(1, self.batch_size // (1 + self.views.number))

    @property
    def texts_per_image(self) -> int:
        """Texts embedded of each image of one caption: it, and its variants."""
        return int(self.with_texts) + (0 if self.text_variants is None else self.text_variants.number)

    def embed(self, numbers: Sequence[int], writer: EmbeddingWriter, progress: Progress, weight: float) -> Timings:
        """Embed shards and write each one when it is complete.

        Args:
            numbers: Numbers of the shards, in the order they are embedded.
            weight: Progress of one sample, on a bar that covers all processes.

        Raises:
            ClipcidError: when too many samples are unusable, a shard is damaged, or a worker ended.
        """
        opened: defaultdict[int, PendingShard] = defaultdict(PendingShard)
        timings, total, read = Timings(), Skips(), 0
        start = time.perf_counter()
        for batch, prepared, rows in map_threads(
            self._prepare(numbers, timings), self._encode, threads_for_batches(self.model.device)
        ):
            shard = opened[batch.number]
            if rows is not None:
                self._add(batch, prepared, rows, shard)
            progress.advance(len(batch.samples) * weight)
            if batch.listing is not None:
                clock = time.perf_counter()
                del opened[batch.number]
                shard.skips.merge(batch.listing.skips)
                self._write(writer, batch.number, batch.listing.read, shard)
                timings.images += len(shard.keys)
                total.merge(shard.skips)
                read += batch.listing.read
                if read >= _EARLY_CHECK:
                    total.check(read, self.max_bad_fraction, self.dataset.spec)
                timings.write += time.perf_counter() - clock
        timings.encode = time.perf_counter() - start - timings.read - timings.write
        return timings

    def preparation(self) -> Preparation:
        """Return what a worker makes of the samples of a batch."""
        views = None
        if self.views is not None:
            views = ViewMaker(self.views, ViewPixels(self.model.info.preprocess))
        return Preparation(
            transform=self.model.pixel_transform(),
            views=views,
            text_variants=self.text_variants,
            tokenizer=self.model.tokenizer if self.with_texts else None,
            batch_size=self.samples_at_once,
            image_size=self.model.info.image_size,
            context_length=self.model.info.context_length,
            fast_decode=self.fast_decode,
        )

    def _prepare(self, numbers: Sequence[int], timings: Timings) -> Iterator[tuple[EmbedBatch, PreparedEmbedBatch]]:
        """Yield each batch of the shards as a worker prepared it, and count the seconds spent waiting for workers."""
        sent = deque[EmbedBatch]()
        prepared = load_batches(self._send(numbers, sent), self.preparation(), self.workers)
        while True:
            start = time.perf_counter()
            ready = next(prepared, None)
            timings.read += time.perf_counter() - start
            if ready is None:
                return
            yield sent.popleft(), ready

    def _send(self, numbers: Sequence[int], sent: deque[EmbedBatch]) -> Iterator[Sequence[Sample]]:
        """Yield the samples of each batch for a worker, and note the batch."""
        batches = self._batches(numbers)
        if any(is_remote(self.dataset.shards[number].file) for number in numbers):
            batches = read_ahead(batches, max(2, self.workers))
        for batch in batches:
            sent.append(batch.without_data())
            yield batch.samples

    def _batches(self, numbers: Sequence[int]) -> Iterator[EmbedBatch]:
        """List the batches of the shards; a shard without a sample has one empty batch, so that it is written as well."""
        for number in numbers:
            skips, without_caption = Skips(), Skips()
            name, read, samples = self.dataset.shards[number].name, 0, list[Sample]()
            for sample in stream_shard(self.dataset, number, skips):
                read += 1
                if self.with_texts and not sample.captions:
                    without_caption.add("no_caption", f"{name}: {sample.key}")
                    continue
                if len(samples) == self.samples_at_once:
                    yield EmbedBatch(number, samples)
                    samples = []
                samples.append(sample)
            read += skips.total
            skips.merge(without_caption)
            yield EmbedBatch(number, samples, Listing(read, skips))

    def _encode(
        self, pair: tuple[EmbedBatch, PreparedEmbedBatch]
    ) -> tuple[EmbedBatch, PreparedEmbedBatch, BatchRows | None]:
        """Embed a batch; None without a sample. Several threads may do so at once."""
        batch, prepared = pair
        samples, count = batch.samples, len(batch.samples)
        if not samples:
            return batch, prepared, None
        images, views = self.encode_pixels(prepared)
        texts, further = None, np.empty((0, images.shape[1]), dtype=np.float16)
        owners = np.empty(0, dtype=np.int64)
        if prepared.tokens is not None and prepared.further is not None:
            texts = self.encode_texts(prepared.tokens)[:count]
            owners = np.repeat(np.arange(count), [len(sample.captions) - 1 for sample in samples])
            further = self.encode_texts(prepared.further)[: len(owners)]
        variants = np.empty((count, 0, images.shape[1]), dtype=np.float16)
        if prepared.variants is not None:
            by_variant = self.encode_texts(prepared.variants).reshape(-1, self.samples_at_once, images.shape[1])
            variants = by_variant[:, :count].transpose(1, 0, 2)
        params = None if prepared.params is None else prepared.params[:count]
        return batch, prepared, BatchRows(images[:count], views[:count], params, texts, further, owners, variants)

    def _add(self, batch: EmbedBatch, prepared: PreparedEmbedBatch, rows: BatchRows, shard: PendingShard) -> None:
        """Add the usable rows of a batch to its shard."""
        name = self.dataset.shards[batch.number].name
        kept = []
        for row, (sample, usable) in enumerate(zip(batch.samples, rows.finite().tolist(), strict=True)):
            reason = prepared.failures.get(row) or (None if usable else "nan_row")
            if reason is None:
                kept.append(row)
            else:
                shard.skips.add(reason, f"{name}: {sample.key}")
        shard.flattened += prepared.flattened
        shard.add(batch.samples, rows, kept)

    def encode_pixels(self, prepared: PreparedEmbedBatch) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """Embed a batch's images and views: float16 [B, D] and [B, V, D], V = 0 without views."""
        pixels, count = prepared.pixels, self.samples_at_once
        if self.views is not None and prepared.colors is not None and self.views.strongest.changes_colors:
            colors = torch.eye(3, 4).repeat(len(pixels), 1, 1)
            colors[count:] = prepared.colors.transpose(0, 1).reshape(-1, 3, 4)  # view after view, as the pixels
            device = self.model.device
            shown = apply_colors(pixels.to(device, non_blocking=True), colors.to(device, non_blocking=True))
            pixels = normalize_pixels(shown, self.model.info.preprocess)
        rows = self._rows(self.model.encode_images(pixels, self.precision))
        by_view = rows.reshape(-1, count, rows.shape[1])
        return by_view[0], by_view[1:].transpose(1, 0, 2)

    def encode_texts(self, tokens: torch.Tensor) -> npt.NDArray[np.float16]:
        """Embed texts, B at a time: int64 [n, L] to float16 [n, D]."""
        empty = np.empty((0, self.model.info.embed_dim), dtype=np.float16)
        blocks = torch.split(tokens, self.samples_at_once)
        return np.concatenate(
            [empty, *(self._rows(self.model.encode_texts(block, self.precision)) for block in blocks if len(block))]
        )

    def _rows(self, rows: torch.Tensor) -> npt.NDArray[np.float16]:
        half: npt.NDArray[np.float16] = rows.to(torch.float16).cpu().numpy()
        return half

    def _write(self, writer: EmbeddingWriter, number: int, read: int, shard: PendingShard) -> None:
        name = self.dataset.shards[number].name
        record = ShardRecord(name, read, len(shard.keys), shard.skips, shard.flattened)
        num_variants = max(0, self.texts_per_image - 1)
        rows = shard.join(self.model.info.embed_dim, self.views, with_texts=self.with_texts, num_variants=num_variants)
        writer.write(number, record, shard.keys, shard.captions, rows)
