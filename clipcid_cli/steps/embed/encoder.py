"""Samples to rows of float16, batch by batch: workers prepare them, the model encodes them."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.loading import load_batches
from clipcid_cli.runtime.models.augment import PACKED_VIEW, PARTNER, ViewPixels, apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.runtime.threads import map_threads, threads_for_batches
from clipcid_cli.steps.embed.prepare import Preparation, Prepared
from clipcid_cli.steps.embed.views import Views

RowsByKind = dict[Kind, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of one shard that are encoded together.

    Attributes:
        shard: Number of the shard.
        samples: n of them, at most as many as a batch holds.
        read: With the shard's last batch, how many samples it has, usable or not; None with those before.
        skipped: With the last batch, those that are in none of the batches.
    """

    shard: int
    samples: Sequence[Sample]
    read: int | None = None
    skipped: Skips = dataclasses.field(default_factory=Skips)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What was made of a batch of n samples.

    Attributes:
        batch: The batch, without the bytes that came with a stream.
        rows: Of n samples by kind, and of their captions after the first.
        failures: Why samples could not be used, by their position.
        laid_on_white: Number of images with transparent pixels.
    """

    batch: Batch
    rows: RowsByKind
    failures: dict[int, str]
    laid_on_white: int

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """Position of the sample of each caption after the first, int64 [F]."""
        further = [max(0, len(sample.captions) - 1) for sample in self.batch.samples]
        return np.repeat(np.arange(len(further)), further)

    def take(self, kept: Sequence[int]) -> RowsByKind:
        """Return the rows of some samples, by their positions."""
        found: RowsByKind = {kind: rows[kept] for kind, rows in self.rows.items() if kind is not Kind.FURTHER}
        if Kind.FURTHER in self.rows:
            found[Kind.FURTHER] = self.rows[Kind.FURTHER][np.isin(self.owners, kept)]
        if Kind.VIEW_PARAMS in found and found[Kind.VIEW_PARAMS].shape[2] > PACKED_VIEW:
            # Partners are counted among the kept; one that is not kept has no row: its place is NaN.
            places = np.full(len(self.batch.samples), np.nan)
            places[kept] = np.arange(len(kept))
            partner = found[Kind.VIEW_PARAMS][:, :, PARTNER]
            numbers = np.array(kept, dtype=np.int64)[:, None] + partner.astype(np.int64)
            partner[:] = places[numbers] - np.arange(len(kept))[:, None]
        return found

    def is_usable(self) -> npt.NDArray[np.bool_]:
        """Mark the samples all of whose rows are finite and not zero, bool [n]: from others no distance can be measured."""
        usable = np.ones(len(self.batch.samples), dtype=np.bool_)
        for kind, rows in self.rows.items():
            found = np.isfinite(rows).all(axis=-1) & rows.any(axis=-1)
            if kind is Kind.FURTHER:
                usable[self.owners[~found]] = False
            elif kind is not Kind.VIEW_PARAMS:
                usable &= found.reshape(len(usable), -1).all(axis=1)
        return usable


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes samples.

    Batches are padded to one size, so that a row's bits depend on its batch alone.

    Attributes:
        precision: Number format of the model's products.
        batch_size: Pictures, and texts, that are encoded together.
        workers: Worker processes; 0 prepares in the process itself.
        with_images: Whether samples have images that are encoded.
        with_texts: Whether captions are; samples must have one.
        fast_decode: Whether JPEGs are decoded at a reduced size.
        views: Augmented views to encode too; None for none.
        text_variants: Variants of the captions to encode too; None for none.
    """

    model: ClipModel
    precision: Precision
    batch_size: int
    workers: int
    with_images: bool = True
    with_texts: bool = True
    fast_decode: bool = False
    views: Views | None = None
    text_variants: TextVariants | None = None

    @property
    def samples_at_once(self) -> int:
        """Samples a batch, B: with V views each makes 1 + V pictures, so that a batch's memory stays what it is."""
        return self.batch_size if self.views is None else max(1, self.batch_size // (1 + self.views.number))

    @property
    def shapes(self) -> dict[Kind, tuple[int, ...]]:
        """Shape of what is made of a sample, by kind; captions after the first, of which samples have any number, apart."""
        width = self.model.info.embed_dim
        found: dict[Kind, tuple[int, ...]] = {}
        if self.with_images:
            found[Kind.IMAGES] = (width,)
        if self.with_texts:
            found[Kind.TEXTS] = (width,)
        if self.views is not None:
            found[Kind.VIEWS] = (self.views.number, width)
            found[Kind.VIEW_PARAMS] = (self.views.number, self.views.packed_size)
        if self.text_variants is not None:
            found[Kind.VARIANTS] = (self.text_variants.number, width)
        return found

    def encode(self, batches: Iterable[Batch], waited: list[float]) -> Iterator[Encoded]:
        """Encode batches, in order; one without samples has no rows.

        Args:
            waited: Seconds spent waiting for workers are appended.
        """
        return map_threads(self._prepare(batches, waited), self._encode, threads_for_batches(self.model.device))

    def preparation(self) -> Preparation:
        """Return what a worker makes of the samples of a batch."""
        info = self.model.info
        return Preparation(
            batch_size=self.samples_at_once,
            image_size=info.image_size,
            context_length=info.context_length,
            transform=self.model.pixel_transform() if self.with_images else None,
            fast_decode=self.fast_decode,
            views=self.views,
            render=ViewPixels(info.preprocess),
            tokenizer=self.model.tokenizer if self.with_texts else None,
            text_variants=self.text_variants,
        )

    def _prepare(self, batches: Iterable[Batch], waited: list[float]) -> Iterator[tuple[Batch, Prepared]]:
        """Yield each batch as a worker prepared it."""
        sent = deque[Batch]()

        def send() -> Iterator[Sequence[Sample]]:
            for batch in batches:
                sent.append(dataclasses.replace(batch, samples=[sample.without_data() for sample in batch.samples]))
                yield batch.samples

        prepared = load_batches(send(), self.preparation(), self.workers)
        while True:
            start = time.perf_counter()
            ready = next(prepared, None)
            waited.append(time.perf_counter() - start)
            if ready is None:
                return
            yield sent.popleft(), ready

    def _encode(self, pair: tuple[Batch, Prepared]) -> Encoded:
        """Encode a batch. Several threads may do so at once."""
        batch, prepared = pair
        found = Encoded(batch, {}, prepared.failures, prepared.laid_on_white)
        count = len(batch.samples)
        if not count:
            return found
        if self.with_images:
            found.rows.update({kind: rows[:count] for kind, rows in self.encode_pixels(prepared).items()})
        for kind, tokens in prepared.tokens.items():
            rows = self.encode_texts(tokens)
            if kind is Kind.VARIANTS:
                rows = rows.reshape(-1, self.samples_at_once, rows.shape[1]).transpose(1, 0, 2)
            found.rows[kind] = rows[: len(found.owners) if kind is Kind.FURTHER else count]
        for row in np.flatnonzero(~found.is_usable()).tolist():
            found.failures.setdefault(row, "nan_row")
        return found

    def encode_pixels(self, prepared: Prepared) -> RowsByKind:
        """Encode a batch's images, [B, D], and views, [B, V, D]."""
        pixels, count = prepared.pixels, self.samples_at_once
        if self.views is not None and prepared.colors is not None and self.views.strongest.changes_colors:
            colors = torch.eye(3, 4).repeat(len(pixels), 1, 1)
            colors[count:] = prepared.colors.transpose(0, 1).reshape(-1, 3, 4)  # view after view, as the pixels
            device = self.model.device
            shown = apply_colors(pixels.to(device, non_blocking=True), colors.to(device, non_blocking=True))
            pixels = normalize_pixels(shown, self.model.info.preprocess)
        rows = _half(self.model.encode_images(pixels, self.precision))
        by_picture = rows.reshape(-1, count, rows.shape[1])
        found: RowsByKind = {Kind.IMAGES: by_picture[0]}
        if prepared.params is not None:
            found[Kind.VIEWS] = by_picture[1:].transpose(1, 0, 2)
            found[Kind.VIEW_PARAMS] = prepared.params
        return found

    def encode_texts(self, tokens: torch.Tensor) -> npt.NDArray[np.float16]:
        """Encode texts, B at a time: int64 [n, L] to float16 [n, D]."""
        empty = np.empty((0, self.model.info.embed_dim), dtype=np.float16)
        blocks = (block for block in torch.split(tokens, self.samples_at_once) if len(block))
        return np.concatenate([empty, *(_half(self.model.encode_texts(block, self.precision)) for block in blocks)])


def _half(rows: torch.Tensor) -> npt.NDArray[np.float16]:
    half: npt.NDArray[np.float16] = rows.to(torch.float16).cpu().numpy()
    return half
