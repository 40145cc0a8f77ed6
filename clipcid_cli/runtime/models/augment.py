"""Random crops and colours of training images: a function of a seed per sample, so that workers hold no state."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from clipcid_cli.runtime.models.views import Box, View, identity_colors

# ITU-R 601 luma, as Pillow and torchvision turn images grey.
_LUMA = np.array([0.299, 0.587, 0.114])
_ASPECT = math.log(4 / 3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are augmented."""

    crop_scale: float = 0.9  # smallest fraction of the image's area that a crop keeps; at 1 the whole image is taken
    color_jitter: float = 0.0  # c: brightness, contrast and saturation are multiplied by factors in [1 − c, 1 + c]
    gray_probability: float = 0.0

    @property
    def changes_colors(self) -> bool:
        return self.color_jitter > 0 or self.gray_probability > 0


def choose_view(augmentation: Augmentation, width: int, height: int, seed: int) -> View:
    """Draw a view; its crop as torchvision's RandomResizedCrop, area in [crop_scale, 1] and aspect ratio in [3/4, 4/3]."""
    random = np.random.default_rng(seed)
    box = _choose_box(width, height, augmentation.crop_scale, random)
    return View(box, _choose_colors(augmentation, random))


def _choose_box(width: int, height: int, crop_scale: float, random: np.random.Generator) -> Box:
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
    colors = identity_colors()
    if not augmentation.changes_colors:
        return colors
    brightness, contrast, saturation = 1 + augmentation.color_jitter * random.uniform(-1, 1, 3)
    if random.uniform() < augmentation.gray_probability:
        saturation = 0.0
    colors[:, :3] = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _LUMA)
    colors[:, 3] = 0.5 * (1 - contrast)
    return colors


@dataclasses.dataclass(frozen=True)
class Masking:
    """A pass of the student's image tower that sees so many of each image's patches, drawn anew in each epoch."""

    kept: int
    patches: int

    @classmethod
    def of(cls, masked_fraction: float, patches: int) -> Masking:
        """Mask at least a fraction of the patches, but leave one."""
        return cls(max(1, int(patches * (1 - masked_fraction))), patches)

    def choose(self, seed: int) -> npt.NDArray[np.int64]:
        """Draw the patches that are seen, int64 [kept], ascending."""
        return np.sort(np.random.default_rng(seed).permutation(self.patches)[: self.kept])
