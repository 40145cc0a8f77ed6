"""Views of images as training shows them: those that the teacher has embedded, two images mixed among them."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.results.matched_samples import Column
from clipcid_cli.runtime.models.augment import (
    Augmentation,
    MixedView,
    ViewPixels,
    choose_view,
    identity_colors,
    mix_pixels,
)
from clipcid_cli.runtime.models.decode import full_size
from clipcid_cli.runtime.randomness import derive_seed


@dataclasses.dataclass(frozen=True)
class StoredView:
    """A view that the teacher has embedded.

    Attributes:
        number: Its number among the image's views, 0 … V − 1.
        packed: What replays it, 16 or 34 numbers.
        partner: Where the image is that is mixed in; None where none is.
    """

    number: int
    packed: tuple[float, ...]
    partner: SampleRef | None = None

    def unpack(self) -> MixedView:
        """Return how it is shown."""
        return MixedView.unpack(np.array(self.packed, dtype=np.float32))


@dataclasses.dataclass(frozen=True)
class StoredViews:
    """The views that `embed --views` stored of a run's samples. In V epochs a sample shows each of its V views once.

    A mixed view is shown where the other image is trained on too, in the same shard: what is held out is never seen.
    Elsewhere the next view of the sample that can be shown takes its place.

    Attributes:
        params: What reproduces the views, [N·V, 16 or 34].
        embedding_rows: Row of the embeddings of each sample, [N], mapped.
        seed: Decides with which view a sample begins.
    """

    params: Rows
    num_views: int
    embedding_rows: Column
    seed: int

    def choose(self, row: int, epoch: int, key: str, shard: slice) -> tuple[StoredView, int | None] | None:
        """Choose the view that a sample shows in an epoch.

        Args:
            row: The sample's row among those to train on.
            shard: The rows of its shard.

        Returns:
            The view, still without its partner, and the partner's row among the samples to train on, where it has one; None
            where no view can be shown.
        """
        first = derive_seed("view", self.seed, key) + epoch
        embedded = int(self.embedding_rows[row])
        for number in (np.arange(first % self.num_views, self.num_views * 2) % self.num_views).tolist():
            place = embedded * self.num_views + number
            packed = self.params.read(place, place + 1)[0]
            shown, view = MixedView.unpack(packed), StoredView(number, tuple(packed.tolist()))
            if shown.weight == 1:
                return view, None
            if not np.isnan(shown.partner):
                found = np.flatnonzero(self.embedding_rows[shard] == embedded + int(shown.partner))
                if len(found):
                    return view, shard.start + int(found[0])
        return None


@dataclasses.dataclass(frozen=True)
class ShownImage:
    """A decoded image and how it is shown.

    Attributes:
        other: The image mixed in; None where none is.
        number: Number of the stored view that this is; −1 for one drawn anew.
    """

    image: Image.Image
    view: MixedView
    other: Image.Image | None = None
    number: int = -1

    @classmethod
    def draw(cls, image: Image.Image, augmentation: Augmentation, seed: int) -> ShownImage:
        """Draw a view of an image."""
        view = choose_view(augmentation, *full_size(image), seed)
        return cls(image, MixedView(view, 1.0, 0.0, view))

    @property
    def colors(self) -> npt.NDArray[np.float32]:
        """Colour map that its pixels still need, float32 [3, 4]; mixed ones have their final colours."""
        return self.view.first.colors if self.other is None else identity_colors()

    def pixels(self, render: ViewPixels) -> npt.NDArray[np.uint8]:
        """Return its pixels for one model, uint8 [H, W, 3]."""
        first = render(self.image, self.view.first)
        return first if self.other is None else mix_pixels(self.view, first, render(self.other, self.view.second))
