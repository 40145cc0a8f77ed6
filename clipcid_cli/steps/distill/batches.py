"""Which samples a run trains on and holds out, in which order, and how a batch of them is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, Sample, refuse_repeated_keys
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.augment import Augmentation, View, ViewPixels, choose_view
from clipcid_cli.runtime.models.clip_model import ClipModel, Tokenizer
from clipcid_cli.runtime.models.decode import SkippedImage, read_image
from clipcid_cli.runtime.randomness import derive_seed, epoch_order, key_fraction
from clipcid_cli.steps.distill.batch_caches import TOKENS_KEPT, ImageCache, TokenCache
from clipcid_cli.steps.distill.stored_views import StoredView, StoredViews

# Lists of samples of this many shards are kept: two groups of the epoch's order, so that a group is listed once.
_SHARDS_KEPT = 32
# Decoded images a worker keeps, so that small data is decoded once and not once an epoch.
_CACHE_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Selection:
    """The samples of one kind (training or held-out), by shard.

    Attributes:
        positions: For each shard, the places in its list of samples, int64, ascending.
        rows: For each shard, the row of each sample among all the data's usable samples, int64.
    """

    positions: list[npt.NDArray[np.int64]]
    rows: list[npt.NDArray[np.int64]]

    @property
    def sizes(self) -> list[int]:
        """Samples of each shard."""
        return [len(positions) for positions in self.positions]

    @property
    def total(self) -> int:
        """Samples of all shards."""
        return sum(self.sizes)

    def narrow(self, keep: npt.NDArray[np.bool_]) -> Selection:
        """Keep the samples whose row is marked; `keep` has one entry per usable sample of the data."""
        masks = [keep[rows] for rows in self.rows]
        return Selection(
            [positions[mask] for positions, mask in zip(self.positions, masks, strict=True)],
            [rows[mask] for rows, mask in zip(self.rows, masks, strict=True)],
        )


@dataclasses.dataclass(frozen=True)
class Usable:
    """All samples that have an image and a caption.

    Attributes:
        keys: Their keys, in order of row.
        caption_counts: Number of captions of each, int32, in order of row.
        skips: Samples that are not usable, by reason.
    """

    selection: Selection
    keys: list[str]
    caption_counts: npt.NDArray[np.int32]
    skips: Skips
    read: int

    def split(self, val_fraction: float) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Mark the rows to train on and those held out: the keys whose hash falls below the fraction."""
        held_out = np.fromiter((key_fraction(key) < val_fraction for key in self.keys), bool, len(self.keys))
        return ~held_out, held_out


def find_usable(dataset: Dataset, max_bad_fraction: float) -> Usable:
    """List the samples that can be trained on.

    Raises:
        ClipcidError: when too many have no image or no caption, or a key repeats.
    """
    skips, keys, counts = Skips(), list[str](), list[int]()
    positions, rows = list[npt.NDArray[np.int64]](), list[npt.NDArray[np.int64]]()
    read = 0
    by_shard: list[tuple[str, list[str]]] = []
    for shard in dataset.shards:
        without_image = skips.total
        samples = shard.samples(skips)
        read += len(samples) + skips.total - without_image
        usable = [place for place, sample in enumerate(samples) if sample.captions]
        for sample in samples:
            if not sample.captions:
                skips.add("no_caption", sample.key)
        positions.append(np.array(usable, dtype=np.int64))
        rows.append(np.arange(len(keys), len(keys) + len(usable), dtype=np.int64))
        by_shard.append((shard.name, [samples[place].key for place in usable]))
        keys.extend(by_shard[-1][1])
        counts.extend(len(samples[place].captions) for place in usable)
    if not keys:
        raise ClipcidError(
            f"{dataset.spec}: none of {read:,} samples has a caption.",
            "Training needs captions: a .txt beside each image, or --caption-column for a list.",
        )
    skips.check(read, max_bad_fraction, dataset.spec)
    refuse_repeated_keys(by_shard)
    return Usable(Selection(positions, rows), keys, np.array(counts, dtype=np.int32), skips, read)


@dataclasses.dataclass(frozen=True)
class Item:
    """One sample of a batch, as it is sent to a worker.

    Attributes:
        row: Its row among the usable samples.
        epoch: The pass over the data; another pass varies it another way.
        sample: Where its image lies, its captions and key.
        view: The stored view to show; None draws one.
    """

    row: int
    epoch: int
    sample: Sample
    view: StoredView | None = None


class BatchOrder:
    """The batches of a run: samples in the order of their epochs, batches running on across the epochs' ends."""

    def __init__(
        self,
        dataset: Dataset,
        selection: Selection,
        seed: int,
        batch_size: int,
        stored_views: StoredViews | None = None,
    ) -> None:
        """Prepare the order.

        Args:
            selection: The samples to train on.
            batch_size: Samples of a global batch.
            stored_views: Stored views to show; None draws a view of each sample.
        """
        self._selection, self._seed, self.batch_size, self._stored_views = selection, seed, batch_size, stored_views
        self._rows = np.concatenate(selection.rows)
        self._positions = np.concatenate(selection.positions)
        self._shard_ends = np.cumsum(selection.sizes)
        self._samples = lru_cache(_SHARDS_KEPT)(lambda shard: dataset.shards[shard].samples())
        self._order = lru_cache(2)(lambda epoch: epoch_order(self._seed, epoch, self._selection.sizes))

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._rows)

    def members(self, step: int) -> list[tuple[int, int]]:
        """Return (epoch, place in the selection) of each sample of a step's global batch."""
        total = len(self._rows)
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [(place // total, int(self._order(place // total)[place % total])) for place in places]

    def items(self, step: int, rank: int, size: int) -> list[Item]:
        """Return one process's part of a step's batch: a contiguous slice, so that gathering restores the batch."""
        share = self.batch_size // size
        return [self._item(epoch, place) for epoch, place in self.members(step)[rank * share : (rank + 1) * share]]

    def iterate(self, start: int, stop: int, rank: int, size: int) -> Iterator[list[Item]]:
        """Yield one process's parts of the batches from step `start` to before `stop`."""
        for step in range(start, stop):
            yield self.items(step, rank, size)

    def _item(self, epoch: int, place: int) -> Item:
        shard = int(np.searchsorted(self._shard_ends, place, side="right"))
        sample = self._samples(shard)[int(self._positions[place])]
        row = int(self._rows[place])
        view = None if self._stored_views is None else self._stored_views.choose(row, epoch, sample.key)
        return Item(row, epoch, sample, view)


@dataclasses.dataclass
class TrainingBatch:
    """One process's part of a batch, as a worker returns it.

    Attributes:
        pixels: uint8 [b, H, W, 3].
        colors: Colour maps, float32 [b, 3, 4].
        tokens: int64 [b, L].
        rows: Rows among the usable samples, int64 [b].
        views: Numbers of the stored views that are shown, int64 [b]; −1 for views drawn anew.
        captions: Which of its captions each sample shows, int64 [b], 0 for the first.
        bad: (reason, key) of images that could not be decoded; they are white in `pixels`.
        teacher_pixels: The same views at an online teacher's size, uint8 [b, H, W, 3]; None without one.
        teacher_tokens: The same captions by its tokenizer, int64 [b, L]; None likewise.
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


@dataclasses.dataclass(frozen=True)
class Processor:
    """How one model reads a sample; picklable.

    Attributes:
        pixels: An image as a view shows it, at the model's size.
    """

    pixels: ViewPixels
    tokenizer: Tokenizer

    @classmethod
    def of(cls, model: ClipModel) -> Processor:
        """Return how `model` reads."""
        return cls(ViewPixels(model.info.preprocess), model.tokenizer)


class BatchMaker:
    """Makes a batch in a worker: decodes, crops, tokenises. What it keeps only saves time.

    A sample with several captions shows one of them, drawn anew each epoch, unless the teacher has embedded the first alone.
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
    ) -> None:
        """Prepare a maker; it is sent to each worker.

        Args:
            augmentation: How views are drawn where no stored one is shown.
            first_caption: Always show a sample's first caption.
            caption_dropout: Probability with which a comma-separated part of a caption, but the first, is left out.
            teacher: How an online teacher reads: it is shown the same views and captions. None without one.
        """
        self._student, self._teacher, self._augmentation, self._seed = student, teacher, augmentation, seed
        self._first_caption, self._caption_dropout = first_caption, caption_dropout
        self._images = ImageCache(_CACHE_BYTES)
        self._tokens = TokenCache(student.tokenizer)
        self._teacher_tokens = None if teacher is None else TokenCache(teacher.tokenizer)

    def __call__(self, items: Sequence[Item]) -> TrainingBatch:
        """Make the batch of `items`, in order."""
        bad = list[tuple[str, str]]()
        shown = [self._show(item, bad) for item in items]
        captions = [self._caption(item) for item in items]
        words = [caption for _, caption in captions]
        teacher = self._teacher
        return TrainingBatch(
            pixels=_stack([self._student.pixels(image, view) for image, view in shown]),
            colors=_stack([view.colors for _, view in shown]),
            tokens=self._tokens(words),
            rows=torch.tensor([item.row for item in items]),
            views=torch.tensor([-1 if item.view is None else item.view.number for item in items]),
            captions=torch.tensor([number for number, _ in captions]),
            bad=bad,
            teacher_pixels=None if teacher is None else _stack([teacher.pixels(*pair) for pair in shown]),
            teacher_tokens=None if self._teacher_tokens is None else self._teacher_tokens(words),
        )

    def _show(self, item: Item, bad: list[tuple[str, str]]) -> tuple[Image.Image, View]:
        """Decode the image and say how it is shown: by the stored view, or by one drawn for this epoch."""
        image = self._images.decode(item.sample, bad)
        if image is not None and item.view is not None:
            return image, item.view.unpack()
        if image is None:
            image = Image.new("RGB", (64, 64), (255, 255, 255))
        seed = derive_seed("augment", self._seed, item.epoch, item.sample.key)
        return image, choose_view(self._augmentation, image.width, image.height, seed)

    def _caption(self, item: Item) -> tuple[int, str]:
        """Choose a caption, and say which of the sample's it is."""
        captions = item.sample.captions
        if self._first_caption or (len(captions) == 1 and not self._caption_dropout):
            return 0, captions[0]
        random = np.random.default_rng(derive_seed("caption", self._seed, item.epoch, item.sample.key))
        number = int(random.integers(len(captions)))
        if not self._caption_dropout:
            return number, captions[number]
        first, *others = captions[number].split(",")
        return number, ",".join([first, *(part for part in others if random.uniform() >= self._caption_dropout)])


def _stack(arrays: list[npt.NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))


def used_tokens(dataset: Dataset, usable: Usable, tokenizer: Tokenizer) -> torch.Tensor | None:
    """List the tokens of all captions of usable samples; None when there are too many to be worth a look.

    Returns:
        int64, ascending, each once.
    """
    if len(usable.keys) > TOKENS_KEPT:
        return None
    found = [torch.empty(0, dtype=torch.int64)]
    for shard, positions in zip(dataset.shards, usable.selection.positions, strict=True):
        if len(positions):
            samples = shard.samples()
            captions = {caption for position in positions for caption in samples[int(position)].captions}
            found.append(torch.unique(tokenizer(sorted(captions))))
    tokens: torch.Tensor = torch.unique(torch.cat(found))
    return tokens


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out samples, ready for the model.

    Attributes:
        pixels: uint8 [n, H, W, 3], the model's own evaluation pixels.
        tokens: int64 [n, L].
        samples: Where they lie, for the report's pictures.
        rows: Their rows among the usable samples.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    samples: list[Sample]
    rows: list[int]


def read_held_out(
    dataset: Dataset,
    selection: Selection,
    transform: Callable[[Image.Image], torch.Tensor],
    tokenizer: Tokenizer,
    limit: int,
) -> HeldOut | None:
    """Read the first `limit` held-out samples; None when there are fewer than two, which retrieval cannot use."""
    samples, rows = list[Sample](), list[int]()
    for shard, positions, shard_rows in zip(dataset.shards, selection.positions, selection.rows, strict=True):
        if len(samples) >= limit:
            break
        if len(positions):
            listed = shard.samples()
            samples.extend(listed[int(position)] for position in positions)
            rows.extend(shard_rows.tolist())
    decoded, kept = list[torch.Tensor](), list[int]()
    for place, sample in enumerate(samples[:limit]):
        image = read_image(sample.image)
        if not isinstance(image, SkippedImage):
            decoded.append(transform(image))
            kept.append(place)
    if len(kept) < 2:
        return None
    chosen = [samples[place] for place in kept]
    tokens = tokenizer([sample.captions[0] for sample in chosen])
    return HeldOut(torch.stack(decoded), tokens, chosen, [rows[place] for place in kept])
