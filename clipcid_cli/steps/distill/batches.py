"""The batches of a run: which samples each has, what a worker makes of some of them, and how they are joined.

Batches are dealt in work items of at most 256 images: a worker needs memory for one of them, whatever the batch.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.sample_rows import take_captions, take_images
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.augment import (
    Augmentation,
    Masking,
    MixedView,
    Processor,
    choose_view,
    identity_colors,
    mix_pixels,
)
from clipcid_cli.runtime.models.caches import MAX_CAPTIONS, ImageCache, TokenCache
from clipcid_cli.runtime.models.decode import SkippedImage, full_size
from clipcid_cli.runtime.pipeline import join_on, ordered_map, prefetch
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.sample_order import SampleOrder
from clipcid_cli.steps.distill.clusters import ClusterLookup
from clipcid_cli.steps.distill.extra_texts import ExtraText
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.samples import index_of
from clipcid_cli.steps.distill.shown import CaptionChooser, ShownCaption, StoredViews
from clipcid_cli.steps.settings.distill import DistillSettings

Piece = TypeVar("Piece")

_MAX_ITEMS = 256
# Decoded images a worker keeps, so that small data is decoded once and not once an epoch.
_MAX_IMAGE_BYTES = 512 * 2**20
_WHITE = Image.new("RGB", (64, 64), (255, 255, 255))


class Item(NamedTuple):
    """One sample of a batch: its row among those to train on, the pass over the data, and where it is."""

    row: int
    epoch: int
    sample: SampleRef


class WorkItem(NamedTuple):
    """What a worker makes a part of a batch of: some samples, and some further texts."""

    items: Sequence[Item]
    extra_texts: Sequence[ExtraText]


class DealtBatch(NamedTuple):
    """A step's batch: the rows of all its samples, int64 [B], and this process's part of it."""

    step: int
    rows: npt.NDArray[np.int64]
    work: list[WorkItem]


@dataclasses.dataclass
class TrainingBatch:
    """One process's part of a batch, or some of it.

    Attributes:
        pixels: uint8 [b, H, W, 3].
        colors: Colour maps, float32 [b, 3, 4]; None where no view changes colours.
        tokens: Of captions and of further texts, int64 [b + e, L].
        bad: (reason, key) of images that could not be decoded; they are white in `pixels`.
        kept_patches: Patches of each image that are seen where the others are masked, int64 [b, n]; None where none are.
        teacher_image_bD: The teacher's stored rows of the images or views that are shown, float16; None without stored ones.
        teacher_text_bD: Those of the captions or variants that are shown; None where it has none.
        teacher_extra_eD: Those of the further texts; None without any.
        teacher_pixels: The same views at an online teacher's size, uint8 [b, H, W, 3]; None without one.
        teacher_tokens: The same captions by its tokenizer, int64 [b, L]; None likewise.
        image_clusters: Cluster targets of the global batch's images; None where no loss needs them.
        text_clusters: Those of its captions, where both towers are taught.
    """

    pixels: Tensor
    colors: Tensor | None
    tokens: Tensor
    bad: list[tuple[str, str]]
    kept_patches: Tensor | None = None
    teacher_image_bD: Tensor | None = None
    teacher_text_bD: Tensor | None = None
    teacher_extra_eD: Tensor | None = None
    teacher_pixels: Tensor | None = None
    teacher_tokens: Tensor | None = None
    image_clusters: ClusterTargets | None = None
    text_clusters: ClusterTargets | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @classmethod
    def join(cls, parts: Sequence[TrainingBatch], device: torch.device) -> TrainingBatch:
        """Join the parts of a process, in order, on a device; all but tokens, which the towers pack on the host."""
        batch = dataclasses.replace(
            parts[0],
            tokens=torch.cat(
                [part.tokens[: len(part)] for part in parts] + [part.tokens[len(part) :] for part in parts]
            ),
            bad=[each for part in parts for each in part.bad],
        )
        if parts[0].teacher_tokens is not None:
            batch.teacher_tokens = torch.cat([part.teacher_tokens for part in parts if part.teacher_tokens is not None])
        for name in _ON_DEVICE:
            found = [getattr(part, name) for part in parts]
            if found[0] is not None:
                setattr(batch, name, join_on(device, found))
        return batch


_ON_DEVICE = (
    "pixels",
    "colors",
    "kept_patches",
    "teacher_image_bD",
    "teacher_text_bD",
    "teacher_extra_eD",
    "teacher_pixels",
)


class BatchMaker:
    """Makes a work item's part of a batch in a worker: decodes, crops, tokenises, reads the teacher's rows.

    What it keeps only saves time. A sample with several captions shows one of them, drawn in each epoch, unless only the
    first is embedded; or a variant.

    Attributes:
        augmentation: How the images that are shown may be augmented.
    """

    def __init__(
        self,
        settings: DistillSettings,
        inputs: Inputs,
        student: Processor,
        teacher: Processor | None = None,
        masking: Masking | None = None,
    ) -> None:
        """Prepare a maker; it is sent to each worker.

        Args:
            teacher: Processor of an online teacher, which is shown the same views and captions. None without one.
            masking: A further pass over images whose patches are masked; None without one.
        """
        stored = inputs.stored
        self._seed = settings.seed
        self._samples = inputs.training
        self._masking = masking
        self._shown_to = [student] if teacher is None else [student, teacher]
        self.augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
        self._rows, self._extra_texts, self._views = None, None, None
        if stored is not None:
            self.augmentation = stored.augmentation(self.augmentation)
            self._rows, self._extra_texts = stored.rows(), stored.extra_texts
            if stored.num_views:
                params = stored.embeddings.rows(Kind.VIEW_PARAMS)
                self._views = StoredViews(params, stored.num_views, inputs.training, settings.seed)
        self._caption = CaptionChooser(
            settings.seed,
            first_only=stored is not None and stored.first_captions,
            dropout=settings.caption_dropout,
            variants=None if stored is None else stored.variants,
            variant_share=settings.variant_share,
        )
        widths, heights = zip(*(each.pixels.draft_size(self.augmentation) for each in self._shown_to), strict=True)
        # Of more samples, what a worker could keep (0.8 GB) would hardly ever be seen again.
        max_bytes, max_captions = (_MAX_IMAGE_BYTES, MAX_CAPTIONS) if inputs.training.total <= MAX_CAPTIONS else (0, 0)
        self._images = ImageCache(max_bytes, (max(widths), max(heights)) if settings.fast_decode else None)
        self._tokens = TokenCache(student.tokenizer, max_captions)
        self._teacher_tokens = None if teacher is None else TokenCache(teacher.tokenizer, max_captions)

    def __call__(self, work: WorkItem) -> TrainingBatch:
        """Make the part, in order; each image is written into its tensor before the next one is decoded."""
        bad, views, captions = list[tuple[str, str]](), list[int](), list[ShownCaption]()
        count = len(work.items)
        colors = torch.empty(count, 3, 4) if self.augmentation.changes_colors else None
        pixels = [_empty_pixels(each, count) for each in self._shown_to]
        for place, item in enumerate(work.items):
            sample = item.sample.read()
            captions.append(self._caption(sample.captions, sample.key, item.epoch))
            number, image, view, other = self._show(item, sample, bad)
            views.append(number)
            for processor, target in zip(self._shown_to, pixels, strict=True):
                shown = processor.pixels(image, view.first)
                if other is not None:
                    shown = mix_pixels(view, shown, processor.pixels(other, view.second))
                target.numpy()[place] = shown
            if colors is not None:
                # Mixed pixels have their final colours.
                colors.numpy()[place] = view.first.colors if other is None else identity_colors()
        texts = [caption.text for caption in captions]
        extra = [] if self._extra_texts is None else [self._extra_texts.read(text) for text in work.extra_texts]
        batch = TrainingBatch(
            pixels=pixels[0],
            colors=colors,
            tokens=self._tokens([*texts, *extra]),
            bad=bad,
            kept_patches=None if self._masking is None else self._choose_patches(self._masking, work.items),
            teacher_pixels=pixels[1] if len(pixels) > 1 else None,
            teacher_tokens=None if self._teacher_tokens is None else self._teacher_tokens(texts),
        )
        self._add_stored_rows(batch, work, views, captions)
        return batch

    def _show(
        self, item: Item, sample: Sample, bad: list[tuple[str, str]]
    ) -> tuple[int, Image.Image, MixedView, Image.Image | None]:
        """Choose the view that is shown: a stored one, else one drawn for this epoch.

        Returns:
            Number of the stored view, −1 where it is none; the image, how it is shown, and the image that is mixed in.
        """
        image = self._decode(sample, bad)
        augmentation = self.augmentation
        if self._views is not None:
            stored = self._views.choose(item.row, item.epoch, sample.key)
            if image is not None and stored is not None:
                other = None if stored.partner is None else self._decode(self._partner(item, stored.partner), bad)
                if other is not None or stored.partner is None:
                    return stored.number, image, stored.view, other
            augmentation = Augmentation(1.0)  # then the teacher's row is that of the whole image
        image = image or _WHITE
        seed = derive_seed("augment", self._seed, item.epoch, sample.key)
        view = choose_view(augmentation, *full_size(image), seed)
        return -1, image, MixedView(view, 1.0, 0.0, view), None

    def _partner(self, item: Item, row: int) -> Sample:
        """Read a sample of the same shard."""
        return item.sample.part.sample(int(self._samples.column("places")[row]))

    def _decode(self, sample: Sample, bad: list[tuple[str, str]]) -> Image.Image | None:
        image = self._images.read(sample.key, sample.image)
        if not isinstance(image, SkippedImage):
            return image
        bad.append((image.reason, sample.key))
        return None

    def _choose_patches(self, masking: Masking, items: Sequence[Item]) -> Tensor:
        seeds = [derive_seed("mask", self._seed, item.epoch, item.sample.key) for item in items]
        return torch.from_numpy(np.stack([masking.choose(seed) for seed in seeds]))

    def _add_stored_rows(
        self, batch: TrainingBatch, work: WorkItem, views: list[int], captions: list[ShownCaption]
    ) -> None:
        """Read the teacher's rows of what is shown, where it has stored ones."""
        if self._rows is None:
            return
        own = np.array([item.row for item in work.items])
        embedded = self._samples.column("embeddings")[own].astype(np.int64)
        batch.teacher_image_bD = torch.from_numpy(take_images(self._rows, embedded, np.array(views)))
        if Kind.TEXTS in self._rows:
            starts = self._samples.column("captions")[own].astype(np.int64) if Kind.FURTHER in self._rows else embedded
            numbers = np.array([caption.number for caption in captions])
            variants = np.array([caption.variant for caption in captions])
            batch.teacher_text_bD = torch.from_numpy(take_captions(self._rows, embedded, numbers, starts, variants))
        if self._extra_texts is not None:
            extra = np.array([text.row for text in work.extra_texts], dtype=np.int64)
            batch.teacher_extra_eD = torch.from_numpy(self._extra_texts.rows.take(extra))


def _empty_pixels(processor: Processor, count: int) -> Tensor:
    width, height = processor.pixels.size
    return torch.empty(count, height, width, 3, dtype=torch.uint8)


class Batches:
    """The batches of a run: samples in the order of their epochs, batches running on across the epochs' ends.

    Attributes:
        batch_size: Samples of a global batch.
    """

    def __init__(
        self,
        inputs: Inputs,
        maker: BatchMaker,
        clusters: ClusterLookup | None,
        batch_size: int,
        seed: int,
        machine: Machine,
    ) -> None:
        """Prepare the batches; of each, this process makes a contiguous slice, so that gathering restores it."""
        self.batch_size = batch_size
        self._samples, self._index = inputs.training, index_of(inputs.dataset)
        self._extra_texts = None if inputs.stored is None else inputs.stored.extra_texts
        self._maker, self._clusters, self._seed, self._machine = maker, clusters, seed, machine
        self._places = self._samples.column("places")
        self._shard_sizes = self._samples.sizes.tolist()
        self._count = -(-batch_size // machine.size // _MAX_ITEMS)

    def __len__(self) -> int:
        """Samples of one epoch."""
        return self._samples.total

    def load(self, steps: range, workers: int) -> Generator[TrainingBatch]:
        """Yield this process's part of each step's batch, ready to train on; made by workers, finished one step ahead."""
        dealt = deque[DealtBatch]()

        def deal() -> Iterator[WorkItem]:
            for batch in self.deal(steps):
                dealt.append(batch)
                yield from batch.work

        with closing(ordered_map(self._maker, deal(), workers)) as made:
            whole = ((dealt.popleft(), parts) for parts in zip(*[made] * self._count, strict=True))
            with closing(prefetch(lambda pair: self.finish(*pair), whole, self._machine.device)) as finished:
                yield from finished

    def deal(self, steps: range) -> Iterator[DealtBatch]:
        """Say what workers shall make of each step's batch; a start anywhere deals the same."""
        order = SampleOrder(self._seed, self._shard_sizes, self._index.fetch_ahead)
        rank, size = self._machine.rank, self._machine.size
        own = slice(rank * self.batch_size // size, (rank + 1) * self.batch_size // size)
        for step in steps:
            first = step * self.batch_size
            rows = order.rows(first, first + self.batch_size)
            epochs = np.arange(first, first + self.batch_size)[own] // len(self)
            refs = self._refs(rows[own])
            items = [Item(*found) for found in zip(rows[own].tolist(), epochs.tolist(), refs, strict=True)]
            pieces = zip(_cut(items, self._count), _cut(self._draw_texts(step, rows), self._count), strict=True)
            yield DealtBatch(step, rows, [WorkItem(*piece) for piece in pieces])

    def make(self, dealt: DealtBatch) -> list[TrainingBatch]:
        """Make the parts of a process here, as workers do."""
        return [self._maker(item) for item in dealt.work]

    def finish(self, dealt: DealtBatch, parts: Sequence[TrainingBatch]) -> TrainingBatch:
        """Join a process's parts on the device and add the cluster targets of the global batch."""
        batch = TrainingBatch.join(parts, self._machine.device)
        if self._clusters is not None:
            batch.image_clusters, batch.text_clusters = self._clusters.targets(dealt.rows, dealt.step)
        return batch

    def keys(self, step: int) -> list[str]:
        """Return the keys of a step's whole batch."""
        rows = SampleOrder(self._seed, self._shard_sizes).rows(step * self.batch_size, (step + 1) * self.batch_size)
        return [ref.key for ref in self._refs(rows)]

    def _refs(self, rows: npt.NDArray[np.int64]) -> list[SampleRef]:
        shards = self._samples.shard_of(rows).tolist()
        parts = {shard: self._index.part(shard) for shard in set(shards)}
        places = self._places[rows].tolist()
        return [SampleRef(parts[shard], place) for shard, place in zip(shards, places, strict=True)]

    def _draw_texts(self, step: int, rows: npt.NDArray[np.int64]) -> list[ExtraText]:
        """Draw this process's part of a step's further texts: a slice of what one process would take.

        Args:
            rows: Of the whole batch.
        """
        extra = self._extra_texts
        if extra is None:
            return []
        random = np.random.default_rng(derive_seed("extra texts", self._seed, step))
        count, rank, size = extra.number_at(self.batch_size), self._machine.rank, self._machine.size
        own = slice(rank * count // size, (rank + 1) * count // size)
        if extra.variants is None:
            return [ExtraText(row) for row in random.integers(len(extra.rows), size=count)[own].tolist()]
        # Captions are read only from shards that the batch reads anyway: another would be fetched for one caption.
        shards = np.unique(self._samples.shard_of(rows)).tolist()
        readable = np.concatenate([np.arange(*self._samples.bounds(shard)) for shard in shards])
        chosen = readable[random.integers(len(readable), size=count)][own]
        variants = random.integers(extra.variants.number, size=count)[own]
        found = self._samples.column("embeddings")[chosen].astype(np.int64) * extra.variants.number + variants
        return [ExtraText(*pair) for pair in zip(found.tolist(), self._refs(chosen), strict=True)]


def _cut(pieces: Sequence[Piece], count: int) -> list[Sequence[Piece]]:
    """Cut a sequence into pieces that differ by one at most."""
    bounds = [len(pieces) * number // count for number in range(count + 1)]
    return [pieces[start:stop] for start, stop in pairwise(bounds)]
