"""Augmented views of images, each drawn from the seed, the image's key and the view's number alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipcid_cli.runtime.models.augment import Augmentation, ViewPixels, choose_view
from clipcid_cli.runtime.randomness import derive_seed


@dataclasses.dataclass(frozen=True)
class Views:
    """Which augmented views of each image are embedded in addition to its evaluation crop.

    Attributes:
        number: V, at least 1.
    """

    number: int
    augmentation: Augmentation
    seed: int


@dataclasses.dataclass(frozen=True)
class ViewMaker:
    """Draws the views of an image, in a worker.

    Attributes:
        pixels: Renders a view as the model takes it.
    """

    views: Views
    pixels: ViewPixels

    def __call__(self, image: Image.Image, key: str) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
        """Return the pixels of each view, uint8 [H, W, 3], and the parameters that reproduce it, float32 [V, 16]."""
        views = [
            choose_view(self.views.augmentation, *image.size, derive_seed("view", self.views.seed, number, key))
            for number in range(self.views.number)
        ]
        return [self.pixels(image, view) for view in views], np.stack([view.pack() for view in views])
