"""Random crops and colours of training images: a function of a seed per sample, so that workers hold no state.

The geometry is done per image in the worker (one resampling, on bytes); colour is a 3 × 4 affine map per image that the
trainer applies to the whole batch together with the normalisation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}
# ITU-R 601 luma, as Pillow and torchvision turn images grey.
_LUMA = np.array([0.299, 0.587, 0.114])
_ASPECT = math.log(4 / 3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    Attributes:
        crop_scale: Smallest share of the image's area a crop keeps; the largest is 1. At 1 the whole image is taken.
        color_jitter: Brightness, contrast and saturation are multiplied by factors in [1 − c, 1 + c].
        gray_probability: Share of images turned grey.
    """

    crop_scale: float = 0.9
    color_jitter: float = 0.0
    gray_probability: float = 0.0

    @property
    def changes_colors(self) -> bool:
        """Whether a colour map is needed at all."""
        return self.color_jitter > 0 or self.gray_probability > 0


@dataclasses.dataclass(frozen=True)
class TrainingPixels:
    """Turns an image into the pixels a student is trained on; picklable.

    Attributes:
        preprocess: The student's PreprocessCfg (size, interpolation).
        augmentation: How images are varied.
    """

    preprocess: dict[str, Any]
    augmentation: Augmentation

    def __call__(self, image: Image.Image, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Crop, resize and choose a colour map.

        The crop is that of torchvision's RandomResizedCrop with area in [crop_scale, 1] and aspect ratio in [3/4, 4/3], the
        student's interpolation; as in open_clip's training transform the result is square whatever the image's shape.

        Args:
            image: RGB of any size.
            seed: Decides everything random.

        Returns:
            uint8 [H, W, 3] and the colour map, float32 [3, 4], see `apply_colors`.
        """
        random = np.random.default_rng(seed)
        size = self.preprocess["size"]
        height, width = (size, size) if isinstance(size, int) else size
        resampling = _RESAMPLING.get(self.preprocess.get("interpolation", "bicubic"), Image.Resampling.BICUBIC)
        box = _choose_box(image.width, image.height, self.augmentation.crop_scale, random)
        resized = image.resize((width, height), resampling, box=box)
        return np.asarray(resized), _choose_colors(self.augmentation, random)


def apply_colors(pixels: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """Apply a colour map to each image.

    Args:
        pixels: uint8 or float [B, H, W, 3], 0…255.
        colors: float32 [B, 3, 4]: out = map[:, :3] · rgb + 255 · map[:, 3].

    Returns:
        float32 [B, H, W, 3], clipped to 0…255.
    """
    batch, height, width, _ = pixels.shape
    flat = pixels.reshape(batch, height * width, 3).float()
    mapped = torch.baddbmm(255 * colors[:, None, :, 3], flat, colors[:, :, :3].transpose(1, 2))
    return mapped.clamp_(0, 255).view(batch, height, width, 3)


def _choose_box(
    width: int, height: int, crop_scale: float, random: np.random.Generator
) -> tuple[float, float, float, float]:
    if crop_scale >= 1:
        return 0, 0, width, height
    for _ in range(10):
        area = width * height * random.uniform(crop_scale, 1)
        aspect = math.exp(random.uniform(-_ASPECT, _ASPECT))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(random.integers(0, width - crop_width + 1))
            top = int(random.integers(0, height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    # No crop of that area fits an image this narrow: the largest central one of an allowed shape.
    crop_width = min(width, round(height * 4 / 3))
    crop_height = min(height, round(width * 4 / 3))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _choose_colors(augmentation: Augmentation, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Compose brightness, contrast (about mid-grey) and saturation into one affine map of RGB in [0, 1]."""
    colors = np.zeros((3, 4), dtype=np.float32)
    colors[:, :3] = np.eye(3)
    if not augmentation.changes_colors:
        return colors
    brightness, contrast, saturation = 1 + augmentation.color_jitter * random.uniform(-1, 1, 3)
    if random.uniform() < augmentation.gray_probability:
        saturation = 0.0
    colors[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _LUMA)
    colors[:, 3] = 0.5 * (1 - contrast)
    return colors
