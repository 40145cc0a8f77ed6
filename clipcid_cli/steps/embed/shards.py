"""The loop of `embed`: shards to rows of float16, one shard's files at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter, ShardRecord, ShardRows
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.loading import load_batches
from clipcid_cli.runtime.models.augment import PACKED_VIEW, Augmentation, ViewPixels, apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.embed.batches import Batch, Preparation, PreparedBatch, ViewMaker
from clipcid_cli.steps.reporting import Progress

# As long as the captions of photographs on the web are in the middle, for estimates.
TYPICAL_CAPTION = "a photo of a cat on a red chair"
# From this many samples on, too many bad ones end the step before all data is read.
_EARLY_CHECK = 10_000


@dataclasses.dataclass
class _OpenShard:
    """A shard of which some batches are still to come."""

    read: int
    skips: Skips
    flattened: int = 0
    keys: list[str] = dataclasses.field(default_factory=list)
    captions: list[str] = dataclasses.field(default_factory=list)
    caption_counts: list[int] = dataclasses.field(default_factory=list)
    images: list[npt.NDArray[np.float16]] = dataclasses.field(default_factory=list)
    texts: list[npt.NDArray[np.float16]] = dataclasses.field(default_factory=list)
    further: list[npt.NDArray[np.float16]] = dataclasses.field(default_factory=list)
    views: list[npt.NDArray[np.float16]] = dataclasses.field(default_factory=list)
    view_params: list[npt.NDArray[np.float32]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Timings:
    """Where one process's time went, in seconds, and how many images it embedded."""

    read: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    images: int = 0


@dataclasses.dataclass(frozen=True)
class Views:
    """Which augmented views of each image are embedded beside its evaluation crop.

    Attributes:
        number: V, at least 1.
    """

    number: int
    augmentation: Augmentation
    seed: int


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

    @property
    def samples_at_once(self) -> int:
        """Samples a batch, B: with V views each makes 1 + V pictures, so that a batch's memory stays what it is."""
        return self.batch_size if self.views is None else max(1, self.batch_size // (1 + self.views.number))

    def embed(self, numbers: Sequence[int], writer: EmbeddingWriter, progress: Progress, weight: float) -> Timings:
        """Embed shards and write each as it is complete.

        Args:
            numbers: Numbers of the shards, in the order they are embedded.
            weight: What one sample counts for, on a bar that stands for all processes.

        Raises:
            ClipcidError: when too many samples are unusable, a shard is damaged, or a worker ended.
        """
        opened: dict[int, _OpenShard] = {}
        timings, total, read = Timings(), Skips(), 0
        clock = time.perf_counter()
        for prepared in load_batches(self._batches(numbers, opened), self._preparation(), self.workers):
            ready = time.perf_counter()
            timings.read += ready - clock
            shard = opened[prepared.batch.number]
            self._encode(prepared, shard)
            clock = time.perf_counter()
            timings.encode += clock - ready
            progress.advance(len(prepared.batch.samples) * weight)
            if prepared.batch.last:
                del opened[prepared.batch.number]
                self._write(writer, prepared.batch.number, shard)
                timings.images += len(shard.keys)
                total.merge(shard.skips)
                read += shard.read
                if read >= _EARLY_CHECK:
                    total.check(read, self.max_bad_fraction, self.dataset.spec)
                timings.write += time.perf_counter() - clock
                clock = time.perf_counter()
        return timings

    def measure_batch(self) -> float:
        """Return the seconds one batch takes to encode, the better of three after a warm-up.

        Its captions are of usual length: what follows a text's end is not encoded.
        """
        prepared = self._preparation()(Batch(0, (), last=True))
        tokens = self.model.tokenizer([TYPICAL_CAPTION] * self.samples_at_once)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            self._encode_pixels(prepared)
            if prepared.tokens is not None:
                self._rows(self.model.encode_texts(tokens, self.precision))
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    def _preparation(self) -> Preparation:
        views = None
        if self.views is not None:
            pixels = ViewPixels(self.model.info.preprocess)
            views = ViewMaker(self.views.number, self.views.augmentation, pixels, self.views.seed)
        return Preparation(
            transform=self.model.pixel_transform(),
            views=views,
            tokenizer=self.model.tokenizer if self.with_texts else None,
            batch_size=self.samples_at_once,
            image_size=self.model.info.image_size,
            context_length=self.model.info.context_length,
            fast_decode=self.fast_decode,
        )

    def _batches(self, numbers: Sequence[int], opened: dict[int, _OpenShard]) -> Iterator[Batch]:
        """List the batches of the shards; a shard without a sample has one empty batch, so that it too is written."""
        for number in numbers:
            shard = self.dataset.shards[number]
            skips = Skips()
            samples = shard.samples(skips)
            read = len(samples) + skips.total
            if self.with_texts:
                for sample in samples:
                    if not sample.captions:
                        skips.add("no_caption", f"{shard.name}: {sample.key}")
                samples = [sample for sample in samples if sample.captions]
            opened[number] = _OpenShard(read, skips)
            for start in range(0, max(1, len(samples)), self.samples_at_once):
                stop = start + self.samples_at_once
                yield Batch(number, samples[start:stop], last=stop >= len(samples))

    def _encode(self, prepared: PreparedBatch, shard: _OpenShard) -> None:
        samples = prepared.batch.samples
        if not samples:
            return
        images, views = self._encode_pixels(prepared)
        usable = _finite(images) & _finite(views).all(axis=1)
        texts, further, owners = None, None, np.empty(0, dtype=np.int64)
        if prepared.tokens is not None and prepared.further is not None:
            texts = self._rows(self.model.encode_texts(prepared.tokens, self.precision))
            usable &= _finite(texts)
            owners = np.repeat(np.arange(len(samples)), [len(sample.captions) - 1 for sample in samples])
            further = self._encode_further(prepared.further)[: len(owners)]
            usable[owners[~_finite(further)]] = False
        name = self.dataset.shards[prepared.batch.number].name
        kept = []
        for row, sample in enumerate(samples):
            reason = prepared.failures.get(row) or (None if usable[row] else "nan_row")
            if reason is None:
                kept.append(row)
            else:
                shard.skips.add(reason, f"{name}: {sample.key}")
        shard.flattened += prepared.flattened
        shard.keys.extend(samples[row].key for row in kept)
        shard.captions.extend(samples[row].captions[0] if samples[row].captions else "" for row in kept)
        shard.images.append(images[kept])
        if texts is not None and further is not None:
            shard.texts.append(texts[kept])
            shard.caption_counts.extend(len(samples[row].captions) for row in kept)
            shard.further.append(further[np.isin(owners, kept)])
        if prepared.params is not None:
            shard.views.append(views[kept])
            shard.view_params.append(prepared.params.transpose(1, 0, 2)[kept])

    def _encode_pixels(self, prepared: PreparedBatch) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """Embed a batch's images and views: float16 [B, D] and [B, V, D], V = 0 without views."""
        pixels, count = prepared.pixels, self.samples_at_once
        if self.views is not None and prepared.params is not None and self.views.augmentation.changes_colors:
            colors = torch.zeros(len(pixels), 3, 4)
            colors[:, :, :3] = torch.eye(3)
            colors[count:] = torch.from_numpy(prepared.params[:, :, 4:].reshape(-1, 3, 4))
            device = self.model.device
            shown = apply_colors(pixels.to(device, non_blocking=True), colors.to(device, non_blocking=True))
            pixels = normalize_pixels(shown, self.model.info.preprocess)
        rows = self._rows(self.model.encode_images(pixels, self.precision))
        by_view = rows.reshape(-1, count, rows.shape[1])
        return by_view[0], by_view[1:].transpose(1, 0, 2)

    def _encode_further(self, tokens: torch.Tensor) -> npt.NDArray[np.float16]:
        """Embed captions after the first, B at a time."""
        empty = np.empty((0, self.model.info.embed_dim), dtype=np.float16)
        blocks = torch.split(tokens, self.samples_at_once)
        return np.concatenate(
            [empty, *(self._rows(self.model.encode_texts(block, self.precision)) for block in blocks if len(block))]
        )

    def _rows(self, rows: torch.Tensor) -> npt.NDArray[np.float16]:
        half: npt.NDArray[np.float16] = rows.to(torch.float16).cpu().numpy()
        return half

    def _write(self, writer: EmbeddingWriter, number: int, shard: _OpenShard) -> None:
        width = self.model.info.embed_dim
        empty = np.empty((0, width), dtype=np.float16)
        record = ShardRecord(
            self.dataset.shards[number].name, shard.read, len(shard.keys), shard.skips, shard.flattened
        )
        rows = ShardRows(
            np.concatenate([empty, *shard.images]), np.concatenate([empty, *shard.texts]) if self.with_texts else None
        )
        if max(shard.caption_counts, default=1) > 1:
            rows = dataclasses.replace(rows, caption_counts=shard.caption_counts, further=np.concatenate(shard.further))
        if self.views is not None:
            no_views = np.empty((0, self.views.number, width), dtype=np.float16)
            no_params = np.empty((0, self.views.number, PACKED_VIEW), dtype=np.float32)
            rows = dataclasses.replace(
                rows,
                views=np.concatenate([no_views, *shard.views]),
                view_params=np.concatenate([no_params, *shard.view_params]),
            )
        writer.write(number, record, shard.keys, shard.captions, rows)


def _finite(rows: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(rows).all(axis=-1), dtype=np.bool_)
