"""What a sample shows in an epoch: which view of its image, and which text. Functions of seed, epoch and key."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.results.matched_samples import SampleRows
from clipcid_cli.runtime.models.augment import MixedView
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.text_variants import TextVariants


class StoredView(NamedTuple):
    """A view that the teacher has embedded."""

    number: int  # among the image's views, 0 … V − 1
    view: MixedView
    partner: int | None  # row, among the samples to train on, of the image that is mixed in; None where none is


@dataclasses.dataclass(frozen=True)
class StoredViews:
    """The views that `embed --views` stored of a run's samples. In V epochs a sample shows each of its V views once.

    A mixed view is shown where the other image is trained on too, in the same shard: what is held out is never seen.
    Elsewhere the next view of the sample that can be shown takes its place.

    Attributes:
        params: What reproduces the views, [N·V, 16 or 34].
        samples: The samples to train on.
    """

    params: Rows
    num_views: int
    samples: SampleRows
    seed: int

    def choose(self, row: int, epoch: int, key: str) -> StoredView | None:
        """Choose the view that a sample shows in an epoch; None where none can be shown.

        Args:
            row: The sample's row among those to train on.
        """
        embedding_rows = self.samples.column("embeddings")
        embedded = int(embedding_rows[row])
        first = derive_seed("view", self.seed, key) + epoch
        for number in (np.arange(first % self.num_views, self.num_views * 2) % self.num_views).tolist():
            place = embedded * self.num_views + number
            view = MixedView.unpack(np.array(self.params.read(place, place + 1)[0], dtype=np.float32))
            if view.weight == 1:
                return StoredView(number, view, None)
            if not np.isnan(view.partner):
                start, end = self.samples.bounds(int(self.samples.shard_of(np.array(row))))
                found = np.flatnonzero(embedding_rows[start:end] == embedded + int(view.partner))
                if len(found):
                    return StoredView(number, view, start + int(found[0]))
        return None


class ShownCaption(NamedTuple):
    """A text, which of the sample's captions it is, and which of its variants; −1 where it is none."""

    text: str
    number: int = 0
    variant: int = -1


@dataclasses.dataclass(frozen=True)
class CaptionChooser:
    """Chooses the text that a sample shows in an epoch.

    Attributes:
        first_only: Always show the first caption, or a variant.
        dropout: Probability with which a comma-separated part of a caption, but the first, is omitted.
        variants: The variants of captions that are embedded; None where none are shown.
        variant_share: Probability with which one of them is shown.
    """

    seed: int
    first_only: bool
    dropout: float
    variants: TextVariants | None
    variant_share: float

    def __call__(self, captions: Sequence[str], key: str, epoch: int) -> ShownCaption:
        """Choose one of a sample's captions, or a variant of one."""
        if self.variants is not None:
            random = np.random.default_rng(derive_seed("variant", self.seed, epoch, key))
            if random.uniform() < self.variant_share:
                variant = int(random.integers(self.variants.number))
                return ShownCaption(self.variants(captions, key, variant), variant=variant)
        if self.first_only or (len(captions) == 1 and not self.dropout):
            return ShownCaption(captions[0])
        random = np.random.default_rng(derive_seed("caption", self.seed, epoch, key))
        number = int(random.integers(len(captions)))
        if not self.dropout:
            return ShownCaption(captions[number], number)
        first, *others = captions[number].split(",")
        kept = [part for part in others if random.uniform() >= self.dropout]
        return ShownCaption(",".join([first, *kept]), number)
