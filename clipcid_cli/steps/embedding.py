"""The loop of `embed`: shards to rows of float16, one shard's files at a time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.formats.dataset import Dataset
from clipcid_cli.formats.embedding_writer import EmbeddingWriter, ShardRecord
from clipcid_cli.formats.samples import Sample
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.encoder import ClipModel, Tokenizer, Transform
from clipcid_cli.runtime.images import UnreadableImage, decode_image, had_alpha
from clipcid_cli.runtime.loading import load_batches
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.reporting import Progress

# From this many samples on, too many bad ones end the step before all data is read.
_EARLY_CHECK = 10_000


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of one shard that are embedded together.

    Attributes:
        number: Number of the shard.
        samples: At most as many as a batch holds.
        last: Whether the shard ends here.
    """

    number: int
    samples: Sequence[Sample]
    last: bool


@dataclasses.dataclass(frozen=True)
class PreparedBatch:
    """What a worker made of a batch; always of the full size B, missing rows are zero.

    Attributes:
        batch: The batch.
        pixels: uint8 [B, H, W, 3].
        tokens: int64 [B, L], or None when texts are not embedded.
        failures: Reason by position, for images that could not be used.
        flattened: Number of images whose transparent pixels were laid on white.
    """

    batch: Batch
    pixels: torch.Tensor
    tokens: torch.Tensor | None
    failures: dict[int, str]
    flattened: int


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What a worker does: bytes to pixels, captions to tokens; picklable.

    Attributes:
        transform: RGB image to uint8 [H, W, 3].
        tokenizer: Texts to int64 [n, L], or None.
        batch_size: B.
        image_size: (H, W).
        context_length: L.
        fast_decode: Whether JPEGs are decoded at a reduced size, of at least twice H × W.
    """

    transform: Transform
    tokenizer: Tokenizer | None
    batch_size: int
    image_size: tuple[int, int]
    context_length: int
    fast_decode: bool

    def __call__(self, batch: Batch) -> PreparedBatch:
        """Prepare one batch."""
        height, width = self.image_size
        draft = (2 * width, 2 * height) if self.fast_decode else None
        pixels = torch.zeros(self.batch_size, height, width, 3, dtype=torch.uint8)
        failures: dict[int, str] = {}
        flattened = 0
        for row, sample in enumerate(batch.samples):
            try:
                image = decode_image(sample.image.read(), draft_size=draft)
            except UnreadableImage as error:
                failures[row] = error.reason
            except OSError:  # the file is gone, or cut off since it was listed
                failures[row] = "unreadable_image"
            else:
                flattened += had_alpha(image)
                pixels[row] = self.transform(image)
        tokens = None
        if self.tokenizer is not None:
            tokens = torch.zeros(self.batch_size, self.context_length, dtype=torch.int64)
            if batch.samples:
                tokens[: len(batch.samples)] = self.tokenizer([sample.captions[0] for sample in batch.samples])
        return PreparedBatch(batch, pixels, tokens, failures, flattened)


@dataclasses.dataclass
class _OpenShard:
    """A shard of which some batches are still to come."""

    read: int
    skips: Skips
    flattened: int = 0
    keys: list[str] = dataclasses.field(default_factory=list)
    captions: list[str] = dataclasses.field(default_factory=list)
    images: list[npt.NDArray[np.float16]] = dataclasses.field(default_factory=list)
    texts: list[npt.NDArray[np.float16]] = dataclasses.field(default_factory=list)


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
        model: The model.
        precision: Number format of its products.
        dataset: The data.
        with_texts: Whether captions are embedded too; samples without one are then left out and counted.
        fast_decode: Whether JPEGs are decoded at a reduced size.
        batch_size: Samples a batch, B.
        workers: Worker processes.
        max_bad_fraction: Largest share of unusable samples.
    """

    model: ClipModel
    precision: Precision
    dataset: Dataset
    with_texts: bool
    fast_decode: bool
    batch_size: int
    workers: int
    max_bad_fraction: float

    def embed(self, numbers: Sequence[int], writer: EmbeddingWriter, progress: Progress, weight: float) -> Timings:
        """Embed shards and write each as it is complete.

        Args:
            numbers: Numbers of the shards, in the order they are embedded.
            writer: Where rows go.
            progress: Counts samples.
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
        """Return the seconds one batch takes to encode, the better of three after a warm-up."""
        prepared = self._preparation()(Batch(0, (), last=True))
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            self._rows(self.model.encode_images(prepared.pixels, self.precision))
            if prepared.tokens is not None:
                self._rows(self.model.encode_texts(prepared.tokens, self.precision))
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    def _preparation(self) -> Preparation:
        return Preparation(
            transform=self.model.pixel_transform(),
            tokenizer=self.model.tokenizer if self.with_texts else None,
            batch_size=self.batch_size,
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
            for start in range(0, max(1, len(samples)), self.batch_size):
                stop = start + self.batch_size
                yield Batch(number, samples[start:stop], last=stop >= len(samples))

    def _encode(self, prepared: PreparedBatch, shard: _OpenShard) -> None:
        samples = prepared.batch.samples
        if not samples:
            return
        images = self._rows(self.model.encode_images(prepared.pixels, self.precision))
        texts = None
        usable = _finite(images)
        if prepared.tokens is not None:
            texts = self._rows(self.model.encode_texts(prepared.tokens, self.precision))
            usable &= _finite(texts)
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
        if texts is not None:
            shard.texts.append(texts[kept])

    def _rows(self, rows: torch.Tensor) -> npt.NDArray[np.float16]:
        half: npt.NDArray[np.float16] = rows.to(torch.float16).cpu().numpy()
        return half

    def _write(self, writer: EmbeddingWriter, number: int, shard: _OpenShard) -> None:
        empty = np.empty((0, self.model.info.embed_dim), dtype=np.float16)
        record = ShardRecord(
            self.dataset.shards[number].name, shard.read, len(shard.keys), shard.skips, shard.flattened
        )
        texts = np.concatenate([empty, *shard.texts]) if self.with_texts else None
        writer.write(number, record, shard.keys, shard.captions, np.concatenate([empty, *shard.images]), texts)


def _finite(rows: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(rows).all(axis=1), dtype=np.bool_)
