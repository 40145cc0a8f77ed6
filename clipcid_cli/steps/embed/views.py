"""Augmented views of images, each drawn from the seed, the image's key, its batch and the view's number alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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

    def kind(self, number: int) -> str:
        """Return the kind of a view."""
        return self.kinds[number % len(self.kinds)]

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
        drawn = self.augmentation
        if "strong" not in self.kinds[: self.number]:
            return drawn
        return Augmentation(
            crop_scale=min(drawn.crop_scale, STRONG.crop_scale),
            color_jitter=max(drawn.color_jitter, STRONG.color_jitter),
            gray_probability=max(drawn.gray_probability, STRONG.gray_probability),
        )


class Mixture(NamedTuple):
    """A view that shows a second image of the batch too: rows of both in the batch, and λ, the weight of the first."""

    row: int
    number: int  # of the view
    other: int
    weight: float


class BatchViews:
    """The views of a batch, drawn as its images are decoded: of each it keeps crops alone.

    A mixture whose second image cannot be read is a view of the first alone.

    Attributes:
        colors: Colour maps that the pixels still need, float32 [B, V, 3, 4].
        params: The numbers that reproduce the views, float32 [B, V, P].
    """

    def __init__(self, views: Views, render: ViewPixels, keys: Sequence[str], pixels: npt.NDArray[np.uint8]) -> None:
        """Prepare for a batch.

        Args:
            pixels: What the views are written to, uint8 [V, B, H, W, 3], B at least the number of keys.
        """
        self._views = views
        self._render = render
        self._keys = keys
        self._pixels = pixels
        rows = pixels.shape[1]
        self.colors = np.zeros((rows, views.number, 3, 4), dtype=np.float32)
        self.params = np.zeros((rows, views.number, views.packed_size), dtype=np.float32)
        self._firsts = dict[tuple[int, int], View]()
        self._seconds = list[tuple[Mixture, View, npt.NDArray[np.uint8]]]()
        self._wanted = defaultdict[int, list[Mixture]](list)
        for mixture in self._choose_mixtures():
            self._wanted[mixture.other].append(mixture)

    def add(self, row: int, image: Image.Image) -> None:
        """Draw all that is shown of a row's image."""
        for number in range(self._views.number):
            strong = self._views.kind(number) == "strong"
            seed = derive_seed("view", self._views.seed, number, self._keys[row])
            view = choose_view(STRONG if strong else self._views.augmentation, *image.size, seed)
            self._pixels[number, row] = self._render(image, view)
            self._firsts[row, number] = view
            self._set(row, number, MixedView(view, 1.0, 0.0, view), view.colors)
        for mixture in self._wanted[row]:
            seed = derive_seed("mixed view", self._views.seed, mixture.number, self._keys[mixture.row])
            second = choose_view(self._views.augmentation, *image.size, seed)
            self._seconds.append((mixture, second, self._render(image, second)))

    def mix(self) -> None:
        """Mix, once all images are added."""
        for mixture, second, shown in self._seconds:
            row = mixture.row
            number = mixture.number
            first = self._firsts.get((row, number))
            if first is not None:
                view = MixedView(first, mixture.weight, mixture.other - row, second)
                self._pixels[number, row] = mix_pixels(view, self._pixels[number, row], shown)
                self._set(row, number, view, identity_colors())

    def _choose_mixtures(self) -> Iterator[Mixture]:
        """Choose the second image of each mixture among the others of the batch; none where an image is alone."""
        numbers = [number for number in range(self._views.number) if self._views.kind(number) == "mix"]
        for row, key in enumerate(self._keys if len(self._keys) > 1 else ()):
            for number in numbers:
                random = np.random.default_rng(derive_seed("mix", self._views.seed, number, key))
                other = int(random.integers(len(self._keys) - 1))
                weight = float(np.float32(random.uniform(0.5, 1)))  # as it is stored
                yield Mixture(row, number, other + (other >= row), weight)

    def _set(self, row: int, number: int, view: MixedView, colors: npt.NDArray[np.float32]) -> None:
        self.colors[row, number] = colors
        self.params[row, number] = view.pack()[: self._views.packed_size]
