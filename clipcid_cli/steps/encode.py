"""Samples to rows: listed in batches, decoded by workers or threads, encoded by a model, in order.

A batch never crosses a shard, and what is made of it depends on it alone: any number of processes, workers and threads
makes the same rows.

Shape letters: B samples of a batch, M captions of them, H × W pixels, L tokens, D width.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from PIL import Image

from clipcid_cli.formats.data.activity import count_received
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.decode import SkippedImage, had_alpha, read_image, was_16_bit
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.models.tokenizers import Tokenizer
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.runtime.pipeline import ordered_map, read_ahead, thread_map, threads_for_batches

BATCH_SIZES = {"cpu": 64, "cuda": 256}
"""Images that are encoded together by default: on a CPU they should stay in its cache, 128 of ViT-B-32 were slower."""

# Batches that wait while a network is read.
_READ_AHEAD = 4


@dataclasses.dataclass
class Batch:
    """Samples of one shard that are encoded together."""

    shard: int
    samples: Sequence[Sample]
    read: int | None = None  # of a shard's last batch: how many samples the shard has, usable or not
    # Of a shard's last batch: those that are in none of its batches.
    skipped: Skips = dataclasses.field(default_factory=Skips)
    waited: float = 0.0  # seconds in which the process waited for a worker to decode it


def list_batches(
    dataset: Dataset,
    shards: Iterable[int],
    stream: Callable[[int, Skips], Iterator[Sample]],
    batch_size: int,
    reject: Callable[[Sample], str | None],
) -> Iterator[Batch]:
    """List the batches of shards; a shard without a usable sample has one empty batch, its last.

    Args:
        stream: Yields the samples of a shard, and counts those it leaves out.
        reject: Says why a sample cannot be used, if so.
    """
    batches = _list_batches(dataset, shards, stream, batch_size, reject)
    return read_ahead(batches, _READ_AHEAD) if any(shard.is_streamed for shard in dataset.shards) else batches


def _list_batches(
    dataset: Dataset,
    shards: Iterable[int],
    stream: Callable[[int, Skips], Iterator[Sample]],
    batch_size: int,
    reject: Callable[[Sample], str | None],
) -> Iterator[Batch]:
    for shard_index in shards:
        shard = dataset.shards[shard_index]
        skipped = Skips()
        rejected = Skips()
        samples = list[Sample]()
        read = 0
        for sample in stream(shard_index, skipped):
            read += 1
            reason = reject(sample)
            if reason is not None:
                rejected.add(reason, shard.describe(sample.key))
                continue
            if len(samples) == batch_size:
                yield Batch(shard_index, samples)
                samples = []
            samples.append(sample)
        read += skipped.total
        skipped.merge(rejected)
        yield Batch(shard_index, samples, read, shard.locate(skipped))


@dataclasses.dataclass
class Decoded:
    """What a worker makes of a batch."""

    # uint8 [B, H, W, 3], zeros where an image cannot be decoded; None where no images are wanted.
    pixels: torch.Tensor | None = None
    tokens: torch.Tensor | None = None  # captions, sample after sample, int64 [M, L]; None where none are wanted
    failures: dict[int, str] = dataclasses.field(default_factory=dict)  # why samples cannot be used, by their position
    # How many images are not shown as they are stored, by what was done: `laid_on_white`, `from_16_bit`.
    adapted: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes the images and tokenises the captions of a batch."""

    render: Renderer | None
    tokenizer: Tokenizer | None
    # Rows of pixels, of which tokens have a multiple: missing rows are zero. None makes no more than there are samples
    # and captions.
    batch_size: int | None = None
    fast_decode: bool = False  # whether JPEGs are decoded at a reduced size, of at least twice the size of the pixels

    @classmethod
    def from_model(cls, model: ClipModel, *, captions: bool) -> Decoder:
        tokenizer = model.tokenizer if captions else None
        return cls(Renderer(model.info.preprocess), tokenizer)

    def __call__(self, samples: Sequence[Sample]) -> Decoded:
        decoded = Decoded(tokens=self.tokenize([caption for sample in samples for caption in sample.captions]))
        if self.render is not None:
            width, height = self.render.size
            decoded.pixels = torch.zeros(self.batch_size or len(samples), height, width, 3, dtype=torch.uint8)
            for row, image in self.read_images(samples, decoded, self.render):
                decoded.pixels.numpy()[row] = self.render(image)
        return decoded

    def read_images(
        self, samples: Sequence[Sample], decoded: Decoded, render: Renderer
    ) -> Iterator[tuple[int, Image.Image]]:
        """Yield the images that can be read, by position, and note the others in `decoded`."""
        draft = render.draft_size() if self.fast_decode else None
        for row, sample in enumerate(samples):
            image = read_image(sample.image, draft)
            if isinstance(image, SkippedImage):
                decoded.failures[row] = image.reason
                continue
            decoded.adapted["laid_on_white"] += had_alpha(image)
            decoded.adapted["from_16_bit"] += was_16_bit(image)
            yield row, image

    def tokenize(self, texts: list[str]) -> torch.Tensor | None:
        if self.tokenizer is None:
            return None
        tokens = self.tokenizer(texts or [""])[: len(texts)]  # some fail without a text
        return torch.nn.functional.pad(tokens, (0, 0, 0, -len(texts) % (self.batch_size or 1)))


@dataclasses.dataclass
class Encoded:
    """What a model makes of samples, which are without the bytes of their images; see `Decoded`."""

    samples: Sequence[Sample]
    # Of each sample by kind, on the CPU; `Kind.TEXTS` of each caption, sample after sample.
    rows: dict[Kind, torch.Tensor]
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    adapted: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def captions(self) -> torch.Tensor:
        """Number of captions of each sample, int64 [B]."""
        return torch.tensor([len(sample.captions) for sample in self.samples], dtype=torch.int64)

    @property
    def owners(self) -> torch.Tensor:
        """Position of the sample of each caption, int64 [M]."""
        return torch.repeat_interleave(torch.arange(len(self.samples)), self.captions)

    @property
    def kept(self) -> torch.Tensor:
        """Positions of the samples that can be used, int64."""
        return torch.tensor([row for row in range(len(self.samples)) if row not in self.failures], dtype=torch.int64)

    def usable(self) -> Encoded:
        if not self.failures:
            return self
        kept = self.kept
        texts = torch.isin(self.owners, kept)
        rows = {kind: values[texts if kind is Kind.TEXTS else kept] for kind, values in self.rows.items()}
        return Encoded([self.samples[row] for row in kept.tolist()], rows, adapted=self.adapted)

    def count_skips(self, shard: Shard) -> Skips:
        if not self.failures:
            return Skips()
        named = {shard.describe(self.samples[row].key): self.failures[row] for row in sorted(self.failures)}
        return shard.locate(Skips.of(named))


def join(parts: Iterable[Encoded]) -> Encoded:
    """Join the usable samples of several batches."""
    samples = list[Sample]()
    rows = defaultdict[Kind, list[torch.Tensor]](list)
    adapted = Counter[str]()
    for part in parts:
        usable = part.usable()
        samples += usable.samples
        adapted += usable.adapted
        for kind, values in usable.rows.items():
            rows[kind].append(values)
    return Encoded(samples, {kind: torch.cat(values) for kind, values in rows.items()}, adapted=adapted)


def encode_batch(towers: Towers, decoded: Decoded) -> dict[Kind, torch.Tensor]:
    """Encode what a worker made of a batch."""
    rows = {}
    if decoded.pixels is not None:
        rows[Kind.IMAGES] = towers.images(decoded.pixels).cpu()
    if decoded.tokens is not None:
        rows[Kind.TEXTS] = towers.encode_texts(decoded.tokens)
    return rows


def decode(
    batches: Iterable[Batch], decoder: Callable[[Sequence[Sample]], Decoded], workers: int
) -> Iterator[tuple[Batch, Decoded]]:
    """Decode batches by workers (0: here), in order; bytes of images that came with a stream are dropped."""
    sent = deque[Batch]()

    def keep(batch: Batch) -> Sequence[Sample]:
        """Return what is decoded of a batch, and keep the rest of it until that is done."""
        sent.append(_drop_bytes(batch))
        return batch.samples

    start = time.perf_counter()
    for decoded in ordered_map(decoder, map(keep, batches), workers, count_received):
        batch = sent.popleft()
        batch.waited = time.perf_counter() - start
        yield batch, decoded
        start = time.perf_counter()


def encode(
    batches: Iterable[Batch],
    decoder: Callable[[Sequence[Sample]], Decoded],
    encoder: Callable[[Decoded], dict[Kind, torch.Tensor]],
    device: torch.device,
    workers: int | None,
) -> Iterator[tuple[Batch, Encoded]]:
    """Decode and encode batches, in order.

    Args:
        device: Where the encoder computes.
        workers: Processes that decode, 0 for none; None decodes by the threads that compute.
    """
    threads = threads_for_batches(device)

    def compute(pair: tuple[Batch, Decoded]) -> tuple[Batch, Encoded]:
        """Encode a batch, and note samples any of whose rows is not finite: nothing can be compared with it."""
        batch, decoded = pair
        samples = batch.samples
        encoded = Encoded(samples, {}, dict(decoded.failures), decoded.adapted)
        if not samples:
            return batch, encoded
        usable = torch.ones(len(samples), dtype=torch.bool)
        for kind, rows in encoder(decoded).items():
            if kind is Kind.TEXTS:
                owners = encoded.owners
                rows = rows[: len(owners)]
                usable[owners[~rows.isfinite().all(dim=-1)]] = False
            else:
                rows = rows[: len(samples)]
                if kind is not Kind.VIEW_PARAMS:
                    usable &= rows.isfinite().all(dim=-1).reshape(len(samples), -1).all(dim=1)
            encoded.rows[kind] = rows
        for row in (~usable).nonzero()[:, 0].tolist():
            encoded.failures.setdefault(row, "nan_row")
        return batch, encoded

    if workers is None:
        return thread_map(lambda batch: compute((_drop_bytes(batch), decoder(batch.samples))), batches, threads)
    return thread_map(compute, decode(batches, decoder, workers), threads)


def _drop_bytes(batch: Batch) -> Batch:
    return dataclasses.replace(batch, samples=[sample.without_image_data() for sample in batch.samples])
