"""The batches of a run: which samples each has, what a worker makes of some of them, and how they are joined.

Batches are dealt in work items of at most 256 images: a worker needs memory for one of them, whatever the batch.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.pipeline import join_on, ordered_map, prefetch
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.sample_order import SampleOrder
from clipcid_cli.steps.distill.clusters import ClusterLookup
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.samples import index_of
from clipcid_cli.steps.distill.stored_teacher import ExtraText

Piece = TypeVar("Piece")

_MAX_ITEMS = 256
_HOST = torch.device("cpu")


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


@dataclasses.dataclass
class TrainingBatch:
    """One process's part of a batch, or some of it.

    Attributes:
        pixels: uint8 [b, H, W, 3].
        colors: Colour maps, float32 [b, 3, 4]; None where none changes anything.
        tokens: Of captions and of further texts, int64 [b + e, L].
        bad: (reason, key) of images that could not be decoded; they are white in `pixels`.
        kept_patches: Patches of each image that are seen where the others are masked, int64 [b, n].
        teacher_image_bD: A stored teacher's rows of the images or views that are shown, float16.
        teacher_text_bD: Those of the captions or variants that are shown.
        teacher_extra_eD: Those of the further texts.
        teacher_pixels: The same views at an online teacher's size, uint8 [b, H, W, 3].
        teacher_tokens: The same captions by its tokenizer, int64 [b, L].
        image_clusters: Targets of the global batch's images.
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
        captions = [part.tokens[: len(part)] for part in parts]
        further = [part.tokens[len(part) :] for part in parts]
        bad = [each for part in parts for each in part.bad]
        batch = dataclasses.replace(parts[0], tokens=torch.cat(captions + further), bad=bad)
        for field in dataclasses.fields(cls):
            found = [getattr(part, field.name) for part in parts]
            if isinstance(found[0], Tensor) and field.name != "tokens":
                setattr(batch, field.name, join_on(_HOST if field.name == "teacher_tokens" else device, found))
        return batch


class Batches:
    """The batches of a run: samples in the order of their epochs, batches running on across the epochs' ends."""

    def __init__(
        self,
        inputs: Inputs,
        make: Callable[[WorkItem], TrainingBatch],
        clusters: ClusterLookup | None,
        batch_size: int,
        seed: int,
        machine: Machine,
    ) -> None:
        """Prepare batches of `batch_size` over all processes; of each, this one makes a contiguous slice.

        Args:
            make: A `BatchMaker`, called in workers.
            clusters: None where no loss needs them.
        """
        self._batch_size = batch_size
        self._samples, self._index = inputs.training, index_of(inputs.dataset)
        self._extra_texts = None if inputs.stored is None else inputs.stored.extra_texts
        self._num_texts = inputs.num_extra_texts(batch_size)
        self._make, self._clusters = make, clusters
        self._seed, self._machine = seed, machine
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

        with closing(ordered_map(self._make, deal(), workers)) as made:
            whole = ((dealt.popleft(), parts) for parts in zip(*[made] * self._count, strict=True))
            with closing(prefetch(lambda pair: self.finish(*pair), whole, self._machine.device)) as finished:
                yield from finished

    def deal(self, steps: range) -> Iterator[DealtBatch]:
        """Say what workers shall make of each step's batch; a start anywhere deals the same."""
        order = SampleOrder(self._seed, self._shard_sizes, self._index.fetch_ahead)
        own = slice(*self._machine.share(self._batch_size))
        for step in steps:
            first = step * self._batch_size
            rows = order.rows(first, first + self._batch_size)
            epochs = np.arange(first, first + self._batch_size)[own] // len(self)
            refs = self._refs(rows[own])
            items = [Item(*found) for found in zip(rows[own].tolist(), epochs.tolist(), refs, strict=True)]
            pieces = zip(_cut(items, self._count), _cut(self._draw_texts(step, rows), self._count), strict=True)
            yield DealtBatch(step, rows, [WorkItem(*piece) for piece in pieces])

    def make(self, dealt: DealtBatch) -> list[TrainingBatch]:
        """Make the parts of a process here, as workers do."""
        return [self._make(item) for item in dealt.work]

    def finish(self, dealt: DealtBatch, parts: Sequence[TrainingBatch]) -> TrainingBatch:
        """Join a process's parts on the device and add the cluster targets of the global batch."""
        batch = TrainingBatch.join(parts, self._machine.device)
        if self._clusters is not None:
            batch.image_clusters, batch.text_clusters = self._clusters.targets(dealt.rows, dealt.step)
        return batch

    def keys(self, step: int) -> list[str]:
        """Return the keys of a step's whole batch."""
        rows = SampleOrder(self._seed, self._shard_sizes).rows(step * self._batch_size, (step + 1) * self._batch_size)
        return [ref.key for ref in self._refs(rows)]

    def _refs(self, rows: npt.NDArray[np.int64]) -> list[SampleRef]:
        shards = self._samples.shard_of(rows).tolist()
        parts = {shard: self._index.part(shard) for shard in set(shards)}
        places = self._places[rows].tolist()
        return [SampleRef(parts[shard], place) for shard, place in zip(shards, places, strict=True)]

    def _draw_texts(self, step: int, rows: npt.NDArray[np.int64]) -> list[ExtraText]:
        """Draw this process's part of a step's further texts: a slice of what one process would take."""
        extra = self._extra_texts
        if extra is None:
            return []
        random = np.random.default_rng(derive_seed("extra texts", self._seed, step))
        count, own = self._num_texts, slice(*self._machine.share(self._num_texts))
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
