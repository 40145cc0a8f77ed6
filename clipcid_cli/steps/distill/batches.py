"""The batches of a run: which samples each has, which view and caption of them it shows, and how a worker makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipcid_cli.formats.data.dataset import Dataset, Sample
from clipcid_cli.formats.data.index import SamplePlace
from clipcid_cli.formats.embeddings.extras import ViewParams
from clipcid_cli.formats.results.matched_samples import Column, SampleRows
from clipcid_cli.runtime.models.augment import Augmentation, Masking, Processor, View, choose_view
from clipcid_cli.runtime.models.caches import ImageCache, TokenCache
from clipcid_cli.runtime.models.decode import SkippedImage, full_size
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.sample_order import SampleOrder
from clipcid_cli.steps.distill.samples import index_of

# Decoded images a worker keeps, so that small data is decoded once and not once an epoch.
_MAX_IMAGE_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredView:
    """A view that the teacher has embedded.

    Attributes:
        number: Its number among the image's views, 0 … V − 1.
        packed: What replays it, 16 numbers.
    """

    number: int
    packed: tuple[float, ...]

    def unpack(self) -> View:
        """Return its box and colour map."""
        return View.unpack(np.array(self.packed, dtype=np.float32))


@dataclasses.dataclass(frozen=True)
class StoredViews:
    """The views that `embed --views` stored of a run's samples. In V epochs a sample shows each of its V views once.

    Attributes:
        embedding_rows: Row of the embeddings of each sample, [N], mapped.
        seed: Decides with which view a sample begins.
    """

    params: ViewParams
    embedding_rows: Column
    seed: int

    def choose(self, row: int, epoch: int, key: str) -> StoredView:
        """Return the view that a sample, by its row, shows in an epoch."""
        number = (derive_seed("view", self.seed, key) + epoch) % self.params.num_views
        return StoredView(number, tuple(self.params.read(int(self.embedding_rows[row]), number).tolist()))


@dataclasses.dataclass(frozen=True)
class Item:
    """One sample of a batch, as it is sent to a worker.

    Attributes:
        row: Its row among the samples to train on.
        epoch: The pass over the data; its view and caption are drawn anew in each.
        sample: Where it is in the data's index.
        view: The stored view to show; None draws one.
    """

    row: int
    epoch: int
    sample: SamplePlace
    view: StoredView | None = None


class BatchOrder:
    """The batches of a run: samples in the order of their epochs, batches running on across the epochs' ends."""

    def __init__(
        self,
        dataset: Dataset,
        samples: SampleRows,
        seed: int,
        batch_size: int,
        stored_views: StoredViews | None = None,
    ) -> None:
        """Prepare the order.

        Args:
            samples: The samples to train on.
            batch_size: Samples of a global batch.
            stored_views: Stored views to show; None draws a view of each sample.
        """
        self.batch_size, self._stored_views = batch_size, stored_views
        self._index = index_of(dataset)
        self._order = SampleOrder(seed, samples.sizes.tolist(), self._index.fetch_ahead)
        # Of its own, as `rows` is called in another thread than `items`, and for steps before those of `items`.
        self._whole = SampleOrder(seed, samples.sizes.tolist())
        self._places = samples.places()
        self._shard_ends = np.cumsum(samples.sizes)

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._order)

    def items(self, step: int, rank: int, size: int) -> list[Item]:
        """Return one process's part of a step's batch: a contiguous slice, so that gathering restores the batch."""
        share = self.batch_size // size
        start = step * self.batch_size + rank * share
        pairs = self._order.between(start, start + share)
        rows = np.array([row for _, row in pairs])
        shards = np.searchsorted(self._shard_ends, rows, side="right").tolist()
        sources = {shard: self._index.source(shard) for shard in set(shards)}
        return [
            self._item(epoch, row, SamplePlace(sources[shard], place))
            for (epoch, row), shard, place in zip(pairs, shards, self._places[rows].tolist(), strict=True)
        ]

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the rows of a step's whole batch, int64 [B], in the order of `items` with one process."""
        start = step * self.batch_size
        return np.array([row for _, row in self._whole.between(start, start + self.batch_size)])

    def iterate(self, start: int, stop: int, rank: int, size: int) -> Iterator[list[Item]]:
        """Yield one process's parts of the batches from step `start` to before `stop`."""
        for step in range(start, stop):
            yield self.items(step, rank, size)

    def _item(self, epoch: int, row: int, sample: SamplePlace) -> Item:
        view = None if self._stored_views is None else self._stored_views.choose(row, epoch, sample.key)
        return Item(row, epoch, sample, view)


@dataclasses.dataclass
class TrainingBatch:
    """One process's part of a batch, as a worker returns it.

    Attributes:
        pixels: uint8 [b, H, W, 3].
        colors: Colour maps, float32 [b, 3, 4].
        tokens: int64 [b, L].
        rows: Rows among the samples to train on, int64 [b].
        views: Numbers of the stored views that are shown, int64 [b]; −1 for views drawn anew.
        captions: Which of its captions each sample shows, int64 [b], 0 for the first.
        bad: (reason, key) of images that could not be decoded; they are white in `pixels`.
        teacher_pixels: The same views at an online teacher's size, uint8 [b, H, W, 3]; None without one.
        teacher_tokens: The same captions by its tokenizer, int64 [b, L]; None likewise.
        kept_patches: Patches of each image that are seen where the others are masked, int64 [b, n]; None where none are.
    """

    pixels: torch.Tensor
    colors: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor
    views: torch.Tensor
    captions: torch.Tensor
    bad: list[tuple[str, str]]
    teacher_pixels: torch.Tensor | None = None
    teacher_tokens: torch.Tensor | None = None
    kept_patches: torch.Tensor | None = None


class BatchMaker:
    """Makes a batch in a worker: decodes, crops, tokenises. What it keeps only saves time.

    A sample with several captions shows one of them, drawn in each epoch, unless only the first is embedded.
    """

    def __init__(
        self,
        student: Processor,
        augmentation: Augmentation,
        seed: int,
        *,
        first_caption: bool,
        caption_dropout: float = 0.0,
        teacher: Processor | None = None,
        fast_decode: bool = False,
        masking: Masking | None = None,
    ) -> None:
        """Prepare a maker; it is sent to each worker.

        Args:
            augmentation: How views are drawn where no stored one is shown.
            first_caption: Always show a sample's first caption.
            caption_dropout: Probability with which a comma-separated part of a caption, but the first, is omitted.
            teacher: Processor of an online teacher, which is shown the same views and captions. None without one.
            fast_decode: Whether JPEGs are decoded at a reduced size, large enough for student and teacher.
            masking: A further pass over images whose patches are masked; None without one.
        """
        self._student, self._teacher, self._augmentation, self._seed = student, teacher, augmentation, seed
        self._first_caption, self._caption_dropout, self._masking = first_caption, caption_dropout, masking
        shown_to = [student] if teacher is None else [student, teacher]
        widths, heights = zip(*(processor.pixels.draft_size(augmentation) for processor in shown_to), strict=True)
        self._images = ImageCache(_MAX_IMAGE_BYTES, (max(widths), max(heights)) if fast_decode else None)
        self._tokens = TokenCache(student.tokenizer)
        self._teacher_tokens = None if teacher is None else TokenCache(teacher.tokenizer)

    def __call__(self, items: Sequence[Item]) -> TrainingBatch:
        """Make the batch of `items`, in order."""
        bad = list[tuple[str, str]]()
        samples = [item.sample.read() for item in items]
        shown = [self._show(item, sample, bad) for item, sample in zip(items, samples, strict=True)]
        numbers, texts = zip(*(self._caption(*pair) for pair in zip(items, samples, strict=True)), strict=True)
        seeds = [derive_seed("mask", self._seed, item.epoch, item.sample.key) for item in items]
        return TrainingBatch(
            pixels=_stack([self._student.pixels(image, view) for image, view in shown]),
            colors=_stack([view.colors for _, view in shown]),
            tokens=self._tokens(texts),
            rows=torch.tensor([item.row for item in items]),
            views=torch.tensor([-1 if item.view is None else item.view.number for item in items]),
            captions=torch.tensor(numbers),
            bad=bad,
            teacher_pixels=None if self._teacher is None else _stack([self._teacher.pixels(*pair) for pair in shown]),
            teacher_tokens=None if self._teacher_tokens is None else self._teacher_tokens(texts),
            kept_patches=None if self._masking is None else _stack([self._masking.choose(seed) for seed in seeds]),
        )

    def _show(self, item: Item, sample: Sample, bad: list[tuple[str, str]]) -> tuple[Image.Image, View]:
        """Decode the image and say how it is shown: by the stored view, or by one drawn for this epoch."""
        image = self._images.read(sample.key, sample.image)
        if isinstance(image, SkippedImage):
            bad.append((image.reason, sample.key))
            image = Image.new("RGB", (64, 64), (255, 255, 255))
        elif item.view is not None:
            return image, item.view.unpack()
        seed = derive_seed("augment", self._seed, item.epoch, sample.key)
        return image, choose_view(self._augmentation, *full_size(image), seed)

    def _caption(self, item: Item, sample: Sample) -> tuple[int, str]:
        """Choose a caption, and say which of the sample's it is."""
        captions = sample.captions
        if self._first_caption or (len(captions) == 1 and not self._caption_dropout):
            return 0, captions[0]
        random = np.random.default_rng(derive_seed("caption", self._seed, item.epoch, sample.key))
        number = int(random.integers(len(captions)))
        if not self._caption_dropout:
            return number, captions[number]
        first, *others = captions[number].split(",")
        return number, ",".join([first, *(part for part in others if random.uniform() >= self._caption_dropout)])


def _stack(arrays: list[npt.NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
