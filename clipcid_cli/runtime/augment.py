"""The augmentation of training: a random crop, drawn from a seed that belongs to the sample."""

from __future__ import annotations

import dataclasses
import math
import random

import torch
from PIL import Image

_INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A crop of random place, area and shape, resized: torchvision's RandomResizedCrop, as open_clip trains with.

    It holds no random state: the seed comes with each call, so that a crop depends on neither worker nor order. Crop and
    resize are one call of Pillow, whose filter sees the pixels just outside the crop's edge where torchvision's does not.

    Attributes:
        size: (height, width) in pixels.
        scale: Range of the crop's share of the image's area, in (0, 1].
        ratio: Range of its width over its height.
        interpolation: ``bicubic`` or ``bilinear``.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        """Crop an image.

        Args:
            image: RGB, of any size.
            seed: Seed of this crop, e.g. of (run, epoch, sample).

        Returns:
            uint8 [H, W, 3], 0…255.
        """
        height, width = self.size
        box = self.box(image.width, image.height, seed)
        pixels = image.resize((width, height), _INTERPOLATIONS[self.interpolation], box=box)
        return torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(height, width, 3)

    def box(self, width: int, height: int, seed: int) -> tuple[int, int, int, int]:
        """Draw the crop (left, top, right, bottom) of an image of `width` × `height` pixels."""
        draw = random.Random(seed)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_ATTEMPTS):
            area = width * height * draw.uniform(*self.scale)
            ratio = math.exp(draw.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = draw.randint(0, width - w), draw.randint(0, height - h)
                return left, top, left + w, top + h
        # No crop of that area fits: the largest central one of a shape within the range.
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h
