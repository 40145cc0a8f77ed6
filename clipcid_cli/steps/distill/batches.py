"""The batches of a run: which samples each has, what a worker makes of at most 256 of them, and how they are joined."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from clipcid_cli.algorithms.losses.registry import list_sample_inputs
from clipcid_cli.formats.data.activity import count_received
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import take_captions, take_images
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import Augmentation, Masking, choose_view
from clipcid_cli.runtime.models.decode import ImageCache, SkippedImage, full_size
from clipcid_cli.runtime.models.renderer import Processor
from clipcid_cli.runtime.models.tokenizers import Tokenizer
from clipcid_cli.runtime.models.views import MixedView, identity_colors, mix_pixels
from clipcid_cli.runtime.pipeline import ordered_map, prefetch
from clipcid_cli.runtime.randomness import SampleOrder, derive_seed
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.samples import index_of
from clipcid_cli.steps.distill.training_batch import HOST, TrainingBatch
from clipcid_cli.steps.settings.distill import DistillSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.distill.clusters import ClusterLookup
    from clipcid_cli.steps.distill.extra_texts import ExtraText

Piece = TypeVar("Piece")

_MAX_ITEMS = 256
# Decoded images a worker keeps, so that small data is decoded once and not once an epoch.
_MAX_IMAGE_BYTES = 512 * 2**20
# Of more samples, what a worker could keep would hardly ever be seen again.
_MAX_SAMPLES_KEPT = 200_000
_WHITE = Image.new("RGB", (64, 64), (255, 255, 255))
_WHOLE = Augmentation(1.0)


class Item(NamedTuple):
    """One sample of a batch: its row among those to train on, the pass over the data, and where it is."""

    row: int
    epoch: int
    sample: SampleRef


class WorkItem(NamedTuple):
    """What a worker makes a part of a batch of."""

    items: Sequence[Item]
    extra_texts: Sequence[ExtraText]


class DealtBatch(NamedTuple):
    """A step's batch: the rows of all its samples, int64 [B], and this process's part of it."""

    step: int
    rows: npt.NDArray[np.int64]
    work: list[WorkItem]


class _View(NamedTuple):
    """How a sample's image is shown."""

    image: Image.Image
    view: MixedView
    mixed_in: Image.Image | None = None
    view_index: int = -1  # of the stored view; −1 for one drawn anew


class _TokenCache:
    """A tokenizer that keeps the tokens of about `max_texts` texts, which are then found in a tenth of the time."""

    def __init__(self, tokenizer: Tokenizer, max_texts: int) -> None:
        self._tokenizer = tokenizer
        self._max_texts = max_texts
        self._tokens = dict[str, Tensor]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return int64 [n, L]."""
        if len(self._tokens) > self._max_texts:
            self._tokens.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            self._tokens.update(zip(new, self._tokenizer(new), strict=True))
        return torch.stack([self._tokens[text] for text in texts]) if texts else self._tokenizer([""])[:0]


class BatchMaker:
    """Makes a work item's part of a batch, in a worker to which it is sent."""

    def __init__(
        self,
        settings: DistillSettings,
        inputs: Inputs,
        student: Processor,
        masking: Masking | None = None,
    ) -> None:
        """A teacher that runs alongside the student is shown the same views and captions."""
        teacher = inputs.teacher
        self._settings = settings
        self._samples = inputs.training
        self._shown_to = [student] if teacher.processor is None else [student, teacher.processor]
        self._masking = masking
        chosen = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
        self._augmentation = teacher.augmentation(chosen)
        self._first_captions = teacher.first_captions or bool(settings.student_caption_key)
        self._shows_captions = settings.shows_captions
        self._extra_texts = teacher.extra_texts
        self._rows = teacher.rows_shown()
        self._num_views = teacher.num_views
        self._sample_inputs: list[Callable[[Sample, Image.Image], float]] = []
        if names := list_sample_inputs(inputs.losses):
            from clipcid_cli.steps.distill.sample_inputs import COMPUTE

            self._sample_inputs = [COMPUTE[name] for name in names]
        crop_scale = self._augmentation.crop_scale
        widths, heights = zip(*(shown.render.draft_size(crop_scale) for shown in self._shown_to), strict=True)
        is_small = inputs.training.total <= _MAX_SAMPLES_KEPT
        draft_size = (max(widths), max(heights)) if settings.fast_decode else None
        self._images = ImageCache(_MAX_IMAGE_BYTES if is_small else 0, draft_size)
        max_texts = _MAX_SAMPLES_KEPT if is_small else 0
        self._tokens = [_TokenCache(processor.tokenizer, max_texts) for processor in self._shown_to]

    def __call__(self, work: WorkItem) -> TrainingBatch:
        """Make the part; each image is written into its tensor before the next one is decoded."""
        bad = list[tuple[str, str]]()
        views = list[int]()
        words = list[str]()
        captions = list[int]()
        count = len(work.items)
        pixels = [
            torch.empty(count, *processor.render.size[::-1], 3, dtype=torch.uint8) for processor in self._shown_to
        ]
        colors = torch.empty(count, 3, 4)
        sample_inputs = torch.empty(count, len(self._sample_inputs))
        for place, item in enumerate(work.items):
            sample = item.sample.read()
            caption, text = self._choose_caption(sample, item.epoch)
            captions.append(caption)
            words.append(text)
            image, view, other, index = self._choose_view(item, sample, bad)
            views.append(index)
            if self._sample_inputs:
                sample_inputs.numpy()[place] = [compute(sample, image) for compute in self._sample_inputs]
            for processor, target in zip(self._shown_to, pixels, strict=True):
                shown = processor.render(image, view.first)
                if other is not None:
                    shown = mix_pixels(view, shown, processor.render(other, view.second))
                target.numpy()[place] = shown
            # Mixed pixels have their final colours.
            colors.numpy()[place] = view.first.colors if other is None else identity_colors()
        further = [] if self._extra_texts is None else [self._extra_texts.read(text) for text in work.extra_texts]
        batch = TrainingBatch(
            pixels=pixels[0],
            colors=colors if self._augmentation.changes_colors else None,
            tokens=None if self._settings.keeps_text_tower else self._tokens[0](words + further),
            bad=bad,
            sample_inputs_bn=sample_inputs if self._sample_inputs else None,
            kept_patches=None if self._masking is None else self._choose_patches(self._masking, work.items),
        )
        if len(self._shown_to) > 1:
            batch.teacher_pixels = pixels[1]
            batch.teacher_tokens = self._tokens[1](words) if self._shows_captions else None
        self._add_stored_rows(batch, work, np.array(views, np.int64), np.array(captions, np.int64))
        return batch

    def count_bytes(self, samples: int, extra_texts: int) -> int:
        """Return the bytes of the tensors of such a part."""
        # A part without samples has rows of the same size, and reads nothing.
        return self(WorkItem([], [])).count_bytes(samples, extra_texts)

    def _choose_view(self, item: Item, sample: Sample, bad: list[tuple[str, str]]) -> _View:
        """Choose a stored view, where there are any, else draw one for this epoch.

        In V epochs a sample shows each of its V views once. A mixed view is shown where the other image is trained on too,
        in the same shard: what is held out is never seen. Elsewhere the next view of the sample that can be shown takes its
        place, and where none can the whole image, which the teacher has embedded as well.
        """
        image = self._decode(sample, bad)
        if image is not None and self._num_views:
            embedding_rows = self._samples.column("embeddings")
            places = self._samples.column("places")
            embedding_row = int(embedding_rows[item.row])
            begin = derive_seed("view", self._settings.seed, sample.key) + item.epoch
            for offset in range(self._num_views):
                index = (begin + offset) % self._num_views
                row = embedding_row * self._num_views + index
                view = MixedView.unpack(np.array(self._rows[Kind.VIEW_PARAMS].read(row, row + 1)[0]))
                if view.weight == 1:
                    return _View(image, view, None, index)
                if not np.isnan(view.partner):
                    first, end = self._samples.bounds(int(self._samples.shard_of(np.array(item.row))))
                    partners = np.flatnonzero(embedding_rows[first:end] == embedding_row + int(view.partner))
                    if len(partners):
                        other = self._decode(item.sample.part.sample(int(places[first + partners[0]])), bad)
                        if other is not None:
                            return _View(image, view, other, index)
                        break
        image = image or _WHITE
        augmentation = _WHOLE if self._num_views else self._augmentation
        seed = derive_seed("augment", self._settings.seed, item.epoch, sample.key)
        drawn = choose_view(augmentation, *full_size(image), seed)
        return _View(image, MixedView(drawn, 1.0, 0.0, drawn))

    def _decode(self, sample: Sample, bad: list[tuple[str, str]]) -> Image.Image | None:
        image = self._images.read(sample.key, sample.image)
        if not isinstance(image, SkippedImage):
            return image
        bad.append((image.reason, sample.key))
        return None

    def _choose_caption(self, sample: Sample, epoch: int) -> tuple[int, str]:
        """Choose one of a sample's captions, but the first where only that is embedded; return its index and text.

        Where none is shown, the text is empty, whatever captions the sample has.
        """
        if not self._shows_captions:
            return 0, ""
        captions = sample.captions
        dropout = self._settings.caption_dropout
        if self._first_captions or (len(captions) == 1 and not dropout):
            return 0, captions[0]
        random = np.random.default_rng(derive_seed("caption", self._settings.seed, epoch, sample.key))
        index = int(random.integers(len(captions)))
        if not dropout:
            return index, captions[index]
        first, *others = captions[index].split(",")
        kept = [part for part in others if random.uniform() >= dropout]
        return index, ",".join([first, *kept])

    def _choose_patches(self, masking: Masking, items: Sequence[Item]) -> Tensor:
        seeds = [derive_seed("mask", self._settings.seed, item.epoch, item.sample.key) for item in items]
        chosen = [masking.choose(seed) for seed in seeds]
        return torch.from_numpy(np.array(chosen, np.int64).reshape(len(items), masking.kept))

    def _add_stored_rows(
        self,
        batch: TrainingBatch,
        work: WorkItem,
        views: npt.NDArray[np.int64],
        captions: npt.NDArray[np.int64],
    ) -> None:
        """Read the teacher's rows of what is shown, where it has stored ones.

        training row
        → embedding row (column ``embeddings`` of the matched samples)
        → with the view and the caption shown, a row of IMAGES or VIEWS, of TEXTS or FURTHER: float16 [D]
        """
        if not self._rows:
            return
        sample_rows = np.array([item.row for item in work.items], np.int64)
        embedding_rows = self._samples.column("embeddings")[sample_rows].astype(np.int64)
        batch.teacher_image_bD = torch.from_numpy(take_images(self._rows, embedding_rows, views))
        if Kind.TEXTS in self._rows:
            starts = embedding_rows
            if Kind.FURTHER in self._rows:
                starts = self._samples.column("captions")[sample_rows].astype(np.int64)
            batch.teacher_text_bD = torch.from_numpy(take_captions(self._rows, embedding_rows, captions, starts))
        if self._extra_texts is not None:
            extra = np.array([text.row for text in work.extra_texts], dtype=np.int64)
            batch.teacher_extra_eD = torch.from_numpy(self._extra_texts.rows.take(extra))


class Batches:
    """The batches of a run: samples in the order of their epochs, batches running on across the epochs' ends."""

    def __init__(
        self,
        inputs: Inputs,
        make: Callable[[WorkItem], TrainingBatch],
        clusters: ClusterLookup | None,
        batch_size: int,
        seed: int,
        context: DistContext,
    ) -> None:
        """Prepare batches of `batch_size` samples over all processes; `make`, a `BatchMaker`, is called in workers."""
        self._inputs = inputs
        self._samples = inputs.training
        self._make = make
        self._clusters = clusters
        self._batch_size = batch_size
        self._seed = seed
        self._context = context
        self._num_parts = count_parts(batch_size // context.size)
        self.copy_seconds = 0.0  # spent so far to join batches and copy them to the device

    def __len__(self) -> int:
        return self._samples.total

    def load(self, steps: range, workers: int) -> Generator[TrainingBatch]:
        """Yield this process's part of each step's batch, ready to train on; made by workers, finished one step ahead."""
        dealt = deque[DealtBatch]()

        def deal() -> Iterator[WorkItem]:
            for batch in self.deal(steps):
                dealt.append(batch)
                yield from batch.work

        with ExitStack() as stack:
            parts = stack.enter_context(closing(ordered_map(self._make, deal(), workers, count_received)))
            if self._num_parts > 1:
                # In shared memory each tensor of a part would hold an open file until its batch is whole. A thread copies
                # them during the step before: the one that keeps a GPU at work has no time for it.
                copies = prefetch(TrainingBatch.copied, parts, HOST, ahead=self._num_parts)
                parts = stack.enter_context(closing(copies))
            whole = ((dealt.popleft(), batch) for batch in zip(*[parts] * self._num_parts, strict=True))
            finished = prefetch(lambda pair: self.finish(*pair), whole, self._context.device)
            yield from stack.enter_context(closing(finished))

    def deal(self, steps: range) -> Iterator[DealtBatch]:
        """Say what workers shall make of each step's batch; a start anywhere deals the same."""
        index = index_of(self._inputs.dataset)
        fetch: Callable[[Sequence[int]], None] | None = None
        if index.cache is not None:
            from clipcid_cli.steps.shard_copies import fetch_part_ahead

            fetch = partial(fetch_part_ahead, index, context=self._context)
        order = SampleOrder(self._seed, self._samples.sizes.tolist(), fetch)
        own = slice(*self._context.rank_range(self._batch_size))
        for step in steps:
            first = step * self._batch_size
            rows = order.rows(first, first + self._batch_size)
            epochs = np.arange(first, first + self._batch_size)[own] // len(self)
            refs = self._inputs.refs(self._samples, rows[own])
            items = [Item(*fields) for fields in zip(rows[own].tolist(), epochs.tolist(), refs, strict=True)]
            texts = self._draw_texts(step, rows)
            yield DealtBatch(
                step, rows, list(map(WorkItem, _cut(items, self._num_parts), _cut(texts, self._num_parts)))
            )

    def make_here(self, dealt: DealtBatch) -> list[TrainingBatch]:
        """Make a process's parts without workers, as ``--dry-run`` does, which times it."""
        return [self._make(item) for item in dealt.work]

    def finish(self, dealt: DealtBatch, parts: Sequence[TrainingBatch]) -> TrainingBatch:
        """Join a process's parts on the device and add the cluster targets of the global batch."""
        began = time.perf_counter()
        batch = TrainingBatch.join(parts, self._context.device)
        if self._clusters is not None:
            own = slice(*self._context.rank_range(len(dealt.rows)))
            batch.image_clusters, batch.text_clusters = self._clusters.targets(dealt.rows, dealt.step, own)
        self.copy_seconds += time.perf_counter() - began
        return batch

    def keys(self, step: int) -> list[str]:
        """Return the keys of a step's whole batch; steps count from 0, as in `deal`."""
        order = SampleOrder(self._seed, self._samples.sizes.tolist())
        rows = order.rows(step * self._batch_size, (step + 1) * self._batch_size)
        return [ref.key for ref in self._inputs.refs(self._samples, rows)]

    def _draw_texts(self, step: int, rows: npt.NDArray[np.int64]) -> list[ExtraText]:
        """Draw this process's part of a step's further texts: a slice of what one process would take."""
        extra = self._inputs.teacher.extra_texts
        if extra is None:
            return []
        from clipcid_cli.steps.distill.extra_texts import ExtraText

        random = np.random.default_rng(derive_seed("extra texts", self._seed, step))
        count = self._inputs.teacher.num_extra_texts(self._batch_size)
        own = slice(*self._context.rank_range(count))
        # Captions are read only from shards that the batch reads anyway: another would be fetched for one caption.
        shards = np.unique(self._samples.shard_of(rows)).tolist()
        readable = np.concatenate([np.arange(*self._samples.bounds(shard)) for shard in shards])
        chosen = readable[random.integers(len(readable), size=count)][own]
        variants = random.integers(extra.variants.number, size=count)[own]
        embedding_rows = self._samples.column("embeddings")[chosen].astype(np.int64)
        variant_rows = embedding_rows * extra.variants.number + variants
        refs = self._inputs.refs(self._samples, chosen)
        return [ExtraText(*pair) for pair in zip(variant_rows.tolist(), refs, strict=True)]


def count_parts(samples: int) -> int:
    """Return of how many work items a process's samples of a batch are made."""
    return -(-samples // _MAX_ITEMS)


def _cut(pieces: Sequence[Piece], count: int) -> list[Sequence[Piece]]:
    """Cut a sequence into pieces that differ by one at most."""
    total = len(pieces)
    return [pieces[total * index // count : total * (index + 1) // count] for index in range(count)]
