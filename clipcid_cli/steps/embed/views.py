"""Augmented views of images, each drawn from the seed, the image's key, its batch and the view's number alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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


class _Mixture(NamedTuple):
    """A view that shows a second image of the batch too: rows of both in the batch, and λ, the weight of the first."""

    row: int
    number: int  # of the view
    other: int
    weight: float


def draw_views(
    views: Views,
    render: ViewPixels,
    keys: Sequence[str],
    images: Iterable[tuple[int, Image.Image]],
    pixels: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Draw the views of a batch as its images are decoded: of each only crops are held.

    A mixture whose second image cannot be read is a view of the first alone.

    Args:
        images: Those that can be read, by their rows.
        pixels: What the views are written to, uint8 [V, B, H, W, 3], B at least the number of keys.

    Returns:
        The colour maps that the pixels still need, [B, V, 3, 4], and the numbers that reproduce the views, [B, V, P].
    """
    shape = pixels.shape[1], views.number
    colors = np.zeros((*shape, 3, 4), dtype=np.float32)
    params = np.zeros((*shape, views.packed_size), dtype=np.float32)
    firsts = dict[tuple[int, int], View]()
    seconds = list[tuple[_Mixture, View, npt.NDArray[np.uint8]]]()
    wanted = defaultdict[int, list[_Mixture]](list)
    for mixture in _choose_mixtures(views, keys):
        wanted[mixture.other].append(mixture)
    for row, image in images:
        for number in range(views.number):
            drawn = STRONG if views.kind(number) == "strong" else views.augmentation
            view = choose_view(drawn, *image.size, derive_seed("view", views.seed, number, keys[row]))
            pixels[number, row] = render(image, view)
            firsts[row, number] = view
            colors[row, number] = view.colors
            params[row, number] = MixedView(view, 1.0, 0.0, view).pack()[: views.packed_size]
        for mixture in wanted[row]:
            seed = derive_seed("mixed view", views.seed, mixture.number, keys[mixture.row])
            second = choose_view(views.augmentation, *image.size, seed)
            seconds.append((mixture, second, render(image, second)))
    for mixture, second, shown in seconds:
        row, number = mixture.row, mixture.number
        first = firsts.get((row, number))
        if first is not None:
            mixed = MixedView(first, mixture.weight, mixture.other - row, second)
            pixels[number, row] = mix_pixels(mixed, pixels[number, row], shown)
            colors[row, number] = identity_colors()
            params[row, number] = mixed.pack()
    return colors, params


def _choose_mixtures(views: Views, keys: Sequence[str]) -> Iterator[_Mixture]:
    """Choose the second image of each mixture among the others of the batch; none where an image is alone."""
    numbers = [number for number in range(views.number) if views.kind(number) == "mix"]
    for row, key in enumerate(keys if len(keys) > 1 else ()):
        for number in numbers:
            random = np.random.default_rng(derive_seed("mix", views.seed, number, key))
            other = int(random.integers(len(keys) - 1))
            weight = float(np.float32(random.uniform(0.5, 1)))  # as it is stored
            yield _Mixture(row, number, other + (other >= row), weight)
