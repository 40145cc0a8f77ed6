"""What a worker makes of samples: the view and the text that each shows in its epoch, and the teacher's rows of them.

All is a function of seed, epoch and sample. What a worker keeps only saves time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.sample_rows import take_captions, take_images
from clipcid_cli.runtime.models.augment import (
    Augmentation,
    Masking,
    MixedView,
    Processor,
    choose_view,
    identity_colors,
    mix_pixels,
)
from clipcid_cli.runtime.models.caches import ImageCache
from clipcid_cli.runtime.models.decode import SkippedImage, full_size
from clipcid_cli.runtime.models.tokenizer import Tokenizer
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps.distill.batches import Item, TrainingBatch, WorkItem
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.settings.distill import DistillSettings

# Decoded images a worker keeps, so that small data is decoded once and not once an epoch.
_MAX_IMAGE_BYTES = 512 * 2**20
# Of more samples, what a worker could keep would hardly ever be seen again.
_MAX_SAMPLES_KEPT = 200_000
_WHITE = Image.new("RGB", (64, 64), (255, 255, 255))
_WHOLE = Augmentation(1.0)


class _View(NamedTuple):
    """How a sample's image is shown."""

    image: Image.Image
    view: MixedView
    other: Image.Image | None = None  # which is mixed in
    number: int = -1  # of the stored view; −1 for one drawn anew


class _Text(NamedTuple):
    """A text, which of the sample's captions it is, and which of its variants; −1 where it is none."""

    text: str
    caption: int = 0
    variant: int = -1


class _TokenCache:
    """A tokenizer that keeps the tokens of texts: looked up, a caption takes a tenth of the time.

    Kept are about `max_texts`, and those of a call.
    """

    def __init__(self, tokenizer: Tokenizer, max_texts: int) -> None:
        self._tokenizer, self._max_texts = tokenizer, max_texts
        self._tokens = dict[str, Tensor]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return int64 [n, L]."""
        if len(self._tokens) > self._max_texts:
            self._tokens.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            self._tokens.update(zip(new, self._tokenizer(new), strict=True))
        return torch.stack([self._tokens[text] for text in texts])


class BatchMaker:
    """Makes a work item's part of a batch, in a worker to which it is sent."""

    def __init__(
        self,
        settings: DistillSettings,
        inputs: Inputs,
        student: Processor,
        teacher: Processor | None = None,
        masking: Masking | None = None,
    ) -> None:
        """Prepare a maker.

        Args:
            teacher: Processor of an online teacher, which is shown the same views and captions. None without one.
            masking: A further pass over images whose patches are masked; None without one.
        """
        stored = inputs.stored
        self._seed = settings.seed
        self._samples = inputs.training
        self._shown_to = [student] if teacher is None else [student, teacher]
        self._masking = masking
        self._caption_dropout = settings.caption_dropout
        self._variant_share = settings.variant_share
        chosen = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
        self._augmentation = chosen if stored is None else stored.augmentation(chosen)
        self._first_captions = stored is not None and stored.first_captions
        self._variants = None if stored is None else stored.variants
        self._extra_texts = None if stored is None else stored.extra_texts
        self._rows = {} if stored is None else stored.rows()
        self._num_views = 0 if stored is None else stored.num_views
        widths, heights = zip(*(each.pixels.draft_size(self._augmentation) for each in self._shown_to), strict=True)
        is_small = inputs.training.total <= _MAX_SAMPLES_KEPT
        draft_size = (max(widths), max(heights)) if settings.fast_decode else None
        self._images = ImageCache(_MAX_IMAGE_BYTES if is_small else 0, draft_size)
        max_texts = _MAX_SAMPLES_KEPT if is_small else 0
        self._tokens = [_TokenCache(each.tokenizer, max_texts) for each in self._shown_to]

    def __call__(self, work: WorkItem) -> TrainingBatch:
        """Make the part, in order; each image is written into its tensor before the next one is decoded."""
        bad, views, texts = list[tuple[str, str]](), list[int](), list[_Text]()
        count = len(work.items)
        pixels = [torch.empty(count, *each.pixels.size[::-1], 3, dtype=torch.uint8) for each in self._shown_to]
        colors = torch.empty(count, 3, 4)
        for place, item in enumerate(work.items):
            sample = item.sample.read()
            texts.append(self._choose_text(sample, item.epoch))
            image, view, other, number = self._choose_view(item, sample, bad)
            views.append(number)
            for processor, target in zip(self._shown_to, pixels, strict=True):
                shown = processor.pixels(image, view.first)
                if other is not None:
                    shown = mix_pixels(view, shown, processor.pixels(other, view.second))
                target.numpy()[place] = shown
            # Mixed pixels have their final colours.
            colors.numpy()[place] = view.first.colors if other is None else identity_colors()
        words = [found.text for found in texts]
        further = [] if self._extra_texts is None else [self._extra_texts.read(text) for text in work.extra_texts]
        batch = TrainingBatch(
            pixels=pixels[0],
            colors=colors if self._augmentation.changes_colors else None,
            tokens=self._tokens[0](words + further),
            bad=bad,
            kept_patches=None if self._masking is None else self._choose_patches(self._masking, work.items),
        )
        if len(self._shown_to) > 1:
            batch.teacher_pixels, batch.teacher_tokens = pixels[1], self._tokens[1](words)
        self._add_stored_rows(batch, work, views, texts)
        return batch

    def _choose_view(self, item: Item, sample: Sample, bad: list[tuple[str, str]]) -> _View:
        """Choose a stored view, where there are any, else draw one for this epoch.

        In V epochs a sample shows each of its V views once. A mixed view is shown where the other image is trained on too,
        in the same shard: what is held out is never seen. Elsewhere the next view of the sample that can be shown takes its
        place, and where none can the whole image, which the teacher has embedded as well.
        """
        image = self._decode(sample, bad)
        if image is not None and self._num_views:
            embedding_rows, places = self._samples.column("embeddings"), self._samples.column("places")
            embedded = int(embedding_rows[item.row])
            begin = derive_seed("view", self._seed, sample.key) + item.epoch
            for offset in range(self._num_views):
                number = (begin + offset) % self._num_views
                row = embedded * self._num_views + number
                view = MixedView.unpack(np.array(self._rows[Kind.VIEW_PARAMS].read(row, row + 1)[0]))
                if view.weight == 1:
                    return _View(image, view, None, number)
                if not np.isnan(view.partner):
                    first, end = self._samples.bounds(int(self._samples.shard_of(np.array(item.row))))
                    found = np.flatnonzero(embedding_rows[first:end] == embedded + int(view.partner))
                    if len(found):
                        other = self._decode(item.sample.part.sample(int(places[first + found[0]])), bad)
                        if other is not None:
                            return _View(image, view, other, number)
                        break
        image = image or _WHITE
        augmentation = _WHOLE if self._num_views else self._augmentation
        drawn = choose_view(augmentation, *full_size(image), derive_seed("augment", self._seed, item.epoch, sample.key))
        return _View(image, MixedView(drawn, 1.0, 0.0, drawn))

    def _decode(self, sample: Sample, bad: list[tuple[str, str]]) -> Image.Image | None:
        image = self._images.read(sample.key, sample.image)
        if not isinstance(image, SkippedImage):
            return image
        bad.append((image.reason, sample.key))
        return None

    def _choose_text(self, sample: Sample, epoch: int) -> _Text:
        """Choose one of a sample's captions, but the first alone where only that is embedded; or a variant of one."""
        captions = sample.captions
        if self._variants is not None:
            random = np.random.default_rng(derive_seed("variant", self._seed, epoch, sample.key))
            if random.uniform() < self._variant_share:
                variant = int(random.integers(self._variants.number))
                return _Text(self._variants(captions, sample.key, variant), variant=variant)
        if self._first_captions or (len(captions) == 1 and not self._caption_dropout):
            return _Text(captions[0])
        random = np.random.default_rng(derive_seed("caption", self._seed, epoch, sample.key))
        number = int(random.integers(len(captions)))
        if not self._caption_dropout:
            return _Text(captions[number], number)
        first, *others = captions[number].split(",")
        kept = [part for part in others if random.uniform() >= self._caption_dropout]
        return _Text(",".join([first, *kept]), number)

    def _choose_patches(self, masking: Masking, items: Sequence[Item]) -> Tensor:
        seeds = [derive_seed("mask", self._seed, item.epoch, item.sample.key) for item in items]
        return torch.from_numpy(np.stack([masking.choose(seed) for seed in seeds]))

    def _add_stored_rows(self, batch: TrainingBatch, work: WorkItem, views: list[int], texts: list[_Text]) -> None:
        """Read the teacher's rows of what is shown, where it has stored ones."""
        if not self._rows:
            return
        own = np.array([item.row for item in work.items])
        embedded = self._samples.column("embeddings")[own].astype(np.int64)
        batch.teacher_image_bD = torch.from_numpy(take_images(self._rows, embedded, np.array(views)))
        if Kind.TEXTS in self._rows:
            starts = self._samples.column("captions")[own].astype(np.int64) if Kind.FURTHER in self._rows else embedded
            captions = np.array([text.caption for text in texts])
            variants = np.array([text.variant for text in texts])
            batch.teacher_text_bD = torch.from_numpy(take_captions(self._rows, embedded, captions, starts, variants))
        if self._extra_texts is not None:
            extra = np.array([text.row for text in work.extra_texts], dtype=np.int64)
            batch.teacher_extra_eD = torch.from_numpy(self._extra_texts.rows.take(extra))
