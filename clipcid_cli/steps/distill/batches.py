"""The batches of a run: which samples each has, which view and caption of them it shows, and how a worker makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipcid_cli.formats.data.dataset import Dataset, Sample
from clipcid_cli.formats.data.index import Part, SampleRef
from clipcid_cli.formats.results.matched_samples import SampleRows
from clipcid_cli.runtime.models.augment import Augmentation, Masking, Processor
from clipcid_cli.runtime.models.caches import ImageCache
from clipcid_cli.runtime.models.decode import SkippedImage
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.sample_order import SampleOrder
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.distill.augmented.captions import CaptionChooser
from clipcid_cli.steps.distill.augmented.extra_texts import ExtraText, ExtraTextReader, ExtraTexts, RowRanges
from clipcid_cli.steps.distill.augmented.items import BatchShare, Item
from clipcid_cli.steps.distill.augmented.views import ShownImage, StoredViews
from clipcid_cli.steps.distill.samples import index_of

# Decoded images a worker keeps, so that small data is decoded once and not once an epoch.
_MAX_IMAGE_BYTES = 512 * 2**20


class BatchOrder:
    """The batches of a run: samples in the order of their epochs, batches running on across the epochs' ends."""

    def __init__(
        self,
        dataset: Dataset,
        samples: SampleRows,
        seed: int,
        batch_size: int,
        stored_views: StoredViews | None = None,
        extra_texts: ExtraTexts | None = None,
    ) -> None:
        """Prepare the order.

        Args:
            samples: The samples to train on.
            batch_size: Samples of a global batch.
            stored_views: Stored views to show; None draws a view of each sample.
            extra_texts: Further texts of each batch; None for none.
        """
        self.batch_size, self._stored_views, self._extra_texts = batch_size, stored_views, extra_texts
        self._index = index_of(dataset)
        self._order = SampleOrder(seed, samples.sizes.tolist(), self._index.fetch_ahead)
        # Of its own, as `rows` is called in another thread than `items`, and for steps before those of `items`.
        self._whole = SampleOrder(seed, samples.sizes.tolist())
        self._places, self._sizes = samples.column("places"), samples.sizes
        self._shard_ends = np.cumsum(samples.sizes)

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._order)

    def items(self, step: int, rank: int, size: int) -> list[Item]:
        """Return one process's part of a step's batch: a contiguous slice, so that gathering restores the batch."""
        return self._items(self._samples_of(step), rank, size)

    def _samples_of(self, step: int) -> list[tuple[int, int]]:
        """Return (epoch, row) of the samples of a step's whole batch."""
        return self._order.between(step * self.batch_size, (step + 1) * self.batch_size)

    def _shards_of(self, samples: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
        """Return the shards of samples given by (epoch, row)."""
        return np.searchsorted(self._shard_ends, np.array([row for _, row in samples]), side="right")

    def _items(self, batch: list[tuple[int, int]], rank: int, size: int) -> list[Item]:
        share = self.batch_size // size
        pairs = batch[rank * share : (rank + 1) * share]
        shards = self._shards_of(pairs).tolist()
        parts = {shard: self._index.part(shard) for shard in set(shards)}
        return [self._item(epoch, row, shard, parts[shard]) for (epoch, row), shard in zip(pairs, shards, strict=True)]

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the rows of a step's whole batch, int64 [B], in the order of `items` with one process."""
        first = step * self.batch_size
        return np.array([row for _, row in self._whole.between(first, first + self.batch_size)])

    def iterate(self, start: int, stop: int, rank: int, size: int) -> Iterator[BatchShare]:
        """Yield one process's parts of the batches from step `start` to before `stop`."""
        for step in range(start, stop):
            batch, texts = self._samples_of(step), list[ExtraText]()
            if self._extra_texts is not None:
                # Captions are read only from shards that the batch reads anyway: another would be fetched for one caption.
                shards = np.unique(self._shards_of(batch))
                ends = self._shard_ends[shards]
                rows = RowRanges(ends - self._sizes[shards], ends)
                texts = self._extra_texts.share(step, self.batch_size, rank, size, rows, self._place)
            yield BatchShare(self._items(batch, rank, size), texts)

    def _place(self, row: int) -> SampleRef:
        """Return where a sample is, by its row."""
        shard = int(np.searchsorted(self._shard_ends, row, side="right"))
        return SampleRef(self._index.part(shard), int(self._places[row]))

    def _item(self, epoch: int, row: int, shard: int, part: Part) -> Item:
        sample = SampleRef(part, int(self._places[row]))
        if self._stored_views is None:
            return Item(row, epoch, sample)
        end = int(self._shard_ends[shard])
        chosen = self._stored_views.choose(row, epoch, sample.key, slice(end - int(self._sizes[shard]), end))
        if chosen is None:
            return Item(row, epoch, sample, whole=True)
        view, partner = chosen
        if partner is not None:
            view = dataclasses.replace(view, partner=SampleRef(part, int(self._places[partner])))
        return Item(row, epoch, sample, view)


@dataclasses.dataclass
class TrainingBatch:
    """One process's part of a batch, as a worker returns it.

    Attributes:
        pixels: uint8 [b, H, W, 3].
        colors: Colour maps, float32 [b, 3, 4].
        tokens: Of captions and of further texts, int64 [b + e, L].
        rows: Rows among the samples to train on, int64 [b].
        views: Numbers of the stored views that are shown, int64 [b]; −1 for views drawn anew.
        captions: Which of its captions each sample shows, int64 [b], 0 for the first.
        variants: Which of its text variants it shows instead, int64 [b]; −1 for none.
        extra_rows: Rows of the teacher's embeddings of the further texts, int64 [e].
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
    variants: torch.Tensor
    extra_rows: torch.Tensor
    bad: list[tuple[str, str]]
    teacher_pixels: torch.Tensor | None = None
    teacher_tokens: torch.Tensor | None = None
    kept_patches: torch.Tensor | None = None


class BatchMaker:
    """Makes a batch in a worker: decodes, crops, tokenises. What it keeps only saves time.

    A sample with several captions shows one of them, drawn in each epoch, unless only the first is embedded; or a variant.
    """

    def __init__(
        self,
        student: Processor,
        augmentation: Augmentation,
        seed: int,
        *,
        first_caption: bool,
        caption_dropout: float = 0.0,
        text_variants: TextVariants | None = None,
        variant_share: float = 0.0,
        extra_text: ExtraTextReader | None = None,
        teacher: Processor | None = None,
        fast_decode: bool = False,
        masking: Masking | None = None,
        keeps: bool = True,
    ) -> None:
        """Prepare a maker; it is sent to each worker.

        Args:
            augmentation: How views are drawn where no stored one is shown.
            first_caption: Always show a sample's first caption.
            caption_dropout: Probability with which a comma-separated part of a caption, but the first, is omitted.
            text_variants: The variants of captions that are embedded; None for none.
            variant_share: Probability with which a sample shows one of them.
            extra_text: Makes further texts; None without any.
            teacher: Processor of an online teacher, which is shown the same views and captions. None without one.
            fast_decode: Whether JPEGs are decoded at a reduced size, large enough for student and teacher.
            masking: A further pass over images whose patches are masked; None without one.
            keeps: Whether decoded images are kept for the next epoch.
        """
        self._student, self._teacher, self._augmentation, self._seed = student, teacher, augmentation, seed
        self._caption = CaptionChooser(seed, first_caption, caption_dropout, text_variants, variant_share)
        self._extra_text, self._masking = extra_text, masking
        shown_to = [student] if teacher is None else [student, teacher]
        widths, heights = zip(*(processor.pixels.draft_size(augmentation) for processor in shown_to), strict=True)
        self._images = ImageCache(
            _MAX_IMAGE_BYTES if keeps else 0, (max(widths), max(heights)) if fast_decode else None
        )

    def __call__(self, share: BatchShare) -> TrainingBatch:
        """Make a process's part of a batch, in order."""
        items, bad = share.items, list[tuple[str, str]]()
        samples = [item.sample.read() for item in items]
        shown = [self._show(item, sample, bad) for item, sample in zip(items, samples, strict=True)]
        pairs = zip(items, samples, strict=True)
        captions = [self._caption(sample.captions, sample.key, item.epoch) for item, sample in pairs]
        texts = [caption.text for caption in captions]
        extra = [] if self._extra_text is None else [self._extra_text(text) for text in share.extra_texts]
        seeds = [derive_seed("mask", self._seed, item.epoch, item.sample.key) for item in items]
        return TrainingBatch(
            pixels=_stack([image.pixels(self._student.pixels) for image in shown]),
            colors=_stack([image.colors for image in shown]),
            tokens=self._student.tokenizer([*texts, *extra]),
            rows=torch.tensor([item.row for item in items]),
            views=torch.tensor([image.number for image in shown]),
            captions=torch.tensor([caption.number for caption in captions]),
            variants=torch.tensor([caption.variant for caption in captions]),
            bad=bad,
            extra_rows=torch.tensor([text.row for text in share.extra_texts], dtype=torch.int64),
            teacher_pixels=None
            if self._teacher is None
            else _stack([each.pixels(self._teacher.pixels) for each in shown]),
            teacher_tokens=None if self._teacher is None else self._teacher.tokenizer(texts),
            kept_patches=None if self._masking is None else _stack([self._masking.choose(seed) for seed in seeds]),
        )

    def _show(self, item: Item, sample: Sample, bad: list[tuple[str, str]]) -> ShownImage:
        """Decode the image and say how it is shown: by the stored view, or by one drawn for this epoch."""
        image = self._decode(sample, bad)
        if image is not None and item.view is not None:
            other = None if item.view.partner is None else self._decode(item.view.partner.read(), bad)
            if other is not None or item.view.partner is None:
                return ShownImage(image, item.view.unpack(), other, item.view.number)
        image = image or Image.new("RGB", (64, 64), (255, 255, 255))
        whole = item.whole or item.view is not None  # the teacher's row is of the whole image where views are stored
        seed = derive_seed("augment", self._seed, item.epoch, sample.key)
        return ShownImage.draw(image, Augmentation(1.0) if whole else self._augmentation, seed)

    def _decode(self, sample: Sample, bad: list[tuple[str, str]]) -> Image.Image | None:
        image = self._images.read(sample.key, sample.image)
        if not isinstance(image, SkippedImage):
            return image
        bad.append((image.reason, sample.key))
        return None


def _stack(arrays: list[npt.NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
