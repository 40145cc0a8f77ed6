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
from clipcid_cli.runtime.models.augment import PACKED_VIEW, PARTNER, apply_colors
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.preprocess import normalize_pixels
from clipcid_cli.runtime.pipeline import ordered_map, thread_map, threads_for_batches
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.embed.prepare import Preparation, Prepared

RowsByKind = dict[Kind, npt.NDArray[Any]]


@dataclasses.dataclass
class Batch:
    """Samples of one shard that are encoded together, and what is made of them.

    Attributes:
        samples: n of them, at most as many as a batch holds.
        read: With the shard's last batch, how many samples it has, usable or not; None with those before.
        skipped: With the last batch, those that are in none of the batches.
        waited: Seconds in which the process waited for a worker to prepare it.
        rows: Of n samples by kind, and of their captions after the first.
        failures: Why samples cannot be used, by their position.
    """

    shard: int
    samples: Sequence[Sample]
    read: int | None = None
    skipped: Skips = dataclasses.field(default_factory=Skips)
    waited: float = 0.0
    rows: RowsByKind = dataclasses.field(default_factory=dict)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    laid_on_white: int = 0

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """Position of the sample of each caption after the first, int64 [F]."""
        further = [max(0, len(sample.captions) - 1) for sample in self.samples]
        return np.repeat(np.arange(len(further)), further)

    def take(self, kept: Sequence[int]) -> RowsByKind:
        """Return the rows of some samples, by their positions."""
        found: RowsByKind = {kind: rows[kept] for kind, rows in self.rows.items() if kind is not Kind.FURTHER}
        if Kind.FURTHER in self.rows:
            found[Kind.FURTHER] = self.rows[Kind.FURTHER][np.isin(self.owners, kept)]
        if Kind.VIEW_PARAMS in found and found[Kind.VIEW_PARAMS].shape[2] > PACKED_VIEW:
            # Partners are counted among the kept; one that is not kept has no row: its place is NaN.
            places = np.full(len(self.samples), np.nan)
            places[kept] = np.arange(len(kept))
            partner = found[Kind.VIEW_PARAMS][:, :, PARTNER]
            numbers = np.array(kept, dtype=np.int64)[:, None] + partner.astype(np.int64)
            partner[:] = places[numbers] - np.arange(len(kept))[:, None]
        return found

    def fail_unusable(self) -> None:
        """Note the samples any of whose rows is zero or not finite: no distance can be measured from it."""
        usable = np.ones(len(self.samples), dtype=np.bool_)
        for kind, rows in self.rows.items():
            found = np.isfinite(rows).all(axis=-1) & rows.any(axis=-1)
            if kind is Kind.FURTHER:
                usable[self.owners[~found]] = False
            elif kind is not Kind.VIEW_PARAMS:
                usable &= found.reshape(len(usable), -1).all(axis=1)
        for row in np.flatnonzero(~usable).tolist():
            self.failures.setdefault(row, "nan_row")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes samples.

    Batches are padded to one size, so that a row's bits depend on its batch alone.

    Attributes:
        batch_size: Pictures, and texts, that are encoded together.
    """

    model: ClipModel
    precision: Precision
    batch_size: int
    workers: int
    preparation: Preparation

    @property
    def shapes(self) -> dict[Kind, tuple[int, ...]]:
        """Shape of what is made of a sample, by kind; captions after the first, of which samples have any number, apart."""
        made = self.preparation
        width = self.model.info.embed_dim
        found: dict[Kind, tuple[int, ...]] = {}
        if made.with_images:
            found[Kind.IMAGES] = (width,)
        if made.with_texts:
            found[Kind.TEXTS] = (width,)
        if made.views is not None:
            found[Kind.VIEWS] = (made.views.number, width)
            found[Kind.VIEW_PARAMS] = (made.views.number, made.views.packed_size)
        if made.text_variants is not None:
            found[Kind.VARIANTS] = (made.text_variants.number, width)
        return found

    def encode(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Encode batches, in order; one without samples has no rows. The bytes that came with a stream are dropped."""
        return thread_map(self._encode, self._prepare(batches), threads_for_batches(self.model.device))

    def _prepare(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Prepared]]:
        """Yield each batch as a worker prepared it."""
        sent = deque[Batch]()

        def send() -> Iterator[Sequence[Sample]]:
            for batch in batches:
                sent.append(dataclasses.replace(batch, samples=[sample.without_data() for sample in batch.samples]))
                yield batch.samples

        start = time.perf_counter()
        for prepared in ordered_map(self.preparation, send(), self.workers):
            batch = sent.popleft()
            batch.waited = time.perf_counter() - start
            yield batch, prepared
            start = time.perf_counter()

    def _encode(self, pair: tuple[Batch, Prepared]) -> Batch:
        """Encode a batch. Several threads may do so at once."""
        batch, prepared = pair
        batch.failures = prepared.failures
        batch.laid_on_white = prepared.laid_on_white
        count = len(batch.samples)
        if not count:
            return batch
        if self.preparation.with_images:
            batch.rows.update({kind: rows[:count] for kind, rows in self.encode_pixels(prepared).items()})
        for kind, tokens in prepared.tokens.items():
            rows = self.encode_texts(tokens)
            if kind is Kind.VARIANTS:
                rows = rows.reshape(-1, self.preparation.batch_size, rows.shape[1]).transpose(1, 0, 2)
            batch.rows[kind] = rows[: len(batch.owners) if kind is Kind.FURTHER else count]
        batch.fail_unusable()
        return batch

    def encode_pixels(self, prepared: Prepared) -> RowsByKind:
        """Encode a batch's images, [B, D], and views, [B, V, D]."""
        pixels = prepared.pixels
        count = self.preparation.batch_size
        views = self.preparation.views
        if views is not None and prepared.colors is not None and views.strongest.changes_colors:
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
        blocks = (block for block in torch.split(tokens, self.preparation.batch_size) if len(block))
        return np.concatenate([empty, *(_half(self.model.encode_texts(block, self.precision)) for block in blocks)])


def _half(rows: torch.Tensor) -> npt.NDArray[np.float16]:
    half: npt.NDArray[np.float16] = rows.to(torch.float16).cpu().numpy()
    return half
