"""Augmented views of images, each drawn from the seed, the image's key, its batch and the view's number alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipcid_cli.runtime.models.augment import (
    PACKED_MIX,
    PACKED_VIEW,
    STRONG,
    Augmentation,
    MixedView,
    View,
    ViewPixels,
    choose_view,
    identity_colors,
    mix_pixels,
)
from clipcid_cli.runtime.randomness import derive_seed


@dataclasses.dataclass(frozen=True)
class Views:
    """Which augmented views of each image are embedded in addition to its evaluation crop.

    Attributes:
        number: V, at least 1.
        kinds: View v is of kind v modulo their number: `crop`, `strong` or `mix`.
        augmentation: How views of kind `crop`, and both images of a `mix`, are drawn.
    """

    number: int
    kinds: tuple[str, ...]
    augmentation: Augmentation
    seed: int

    @property
    def mixes(self) -> bool:
        """Whether any view shows two images."""
        return "mix" in self.kinds[: self.number]

    @property
    def packed_size(self) -> int:
        """Numbers stored of each view."""
        return PACKED_MIX if self.mixes else PACKED_VIEW

    @property
    def strongest(self) -> Augmentation:
        """The smallest crops and strongest colours of any kind."""
        drawn, strong = self.augmentation, STRONG
        if "strong" not in self.kinds[: self.number]:
            return drawn
        return Augmentation(
            crop_scale=min(drawn.crop_scale, strong.crop_scale),
            color_jitter=max(drawn.color_jitter, strong.color_jitter),
            gray_probability=max(drawn.gray_probability, strong.gray_probability),
        )


@dataclasses.dataclass(frozen=True)
class ViewMaker:
    """Draws the views of images, in a worker.

    Attributes:
        pixels: Renders a view as the model takes it.
    """

    views: Views
    pixels: ViewPixels

    def __call__(
        self, row: int, images: Mapping[int, Image.Image], keys: Sequence[str]
    ) -> tuple[list[npt.NDArray[np.uint8]], list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]]:
        """Draw the views of one image of a batch.

        Args:
            row: Its row in the batch.
            images: The readable images of the batch by row; it alone will do where none is mixed.
            keys: The keys of the batch.

        Returns:
            Of each view its pixels, uint8 [H, W, 3]; the colour map they still need, float32 [3, 4]; and the numbers that
            reproduce it, float32 [16], or [34] where any view is mixed.
        """
        pixels, colors, packed = [], [], []
        for number in range(self.views.number):
            kind = self.views.kinds[number % len(self.views.kinds)]
            augmentation = STRONG if kind == "strong" else self.views.augmentation
            seed = derive_seed("view", self.views.seed, number, keys[row])
            view = choose_view(augmentation, *images[row].size, seed)
            shown, needed = self.pixels(images[row], view), view.colors
            mixed = MixedView(view, 1.0, 0.0, view)
            if kind == "mix":
                mixed, other = self._mix(row, view, images, number, keys[row])
                shown, needed = mix_pixels(mixed, shown, self.pixels(other, mixed.second)), identity_colors()
            pixels.append(shown)
            colors.append(needed)
            packed.append(mixed.pack()[: self.views.packed_size])
        return pixels, colors, packed

    def _mix(
        self, row: int, view: View, images: Mapping[int, Image.Image], number: int, key: str
    ) -> tuple[MixedView, Image.Image]:
        """Choose another image of the batch, itself where there is no other, and how it is mixed in."""
        random = np.random.default_rng(derive_seed("mix", self.views.seed, number, key))
        others = [other for other in images if other != row] or [row]
        other = others[int(random.integers(len(others)))]
        weight = float(np.float32(random.uniform(0.5, 1)))
        seed = derive_seed("mixed view", self.views.seed, number, key)
        second = choose_view(self.views.augmentation, *images[other].size, seed)
        return MixedView(view, weight, other - row, second), images[other]
