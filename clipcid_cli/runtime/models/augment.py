"""Random crops and colours of training images: a function of a seed per sample, so that workers hold no state.

A view is a crop box in the image's own pixels and a colour map: numbers that show any model, at whatever size it takes, the
same part of the image in the same colours. Crops are made by the workers; colours are changed with the normalisation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from clipcid_cli.runtime.models.clip_model import ClipModel, Tokenizer
from clipcid_cli.runtime.models.decode import full_size

# ITU-R 601 luma, as Pillow and torchvision turn images grey.
_LUMA = np.array([0.299, 0.587, 0.114])
_ASPECT = math.log(4 / 3)

Box = tuple[float, float, float, float]

PACKED_VIEW = 16  # numbers of a packed view
PACKED_MIX = 2 * PACKED_VIEW + 2  # numbers of one that may be mixed
PARTNER = PACKED_VIEW + 1  # which of these is the partner's place


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are augmented."""

    crop_scale: float = 0.9  # smallest fraction of the image's area that a crop keeps; at 1 the whole image is taken
    color_jitter: float = 0.0  # c: brightness, contrast and saturation are multiplied by factors in [1 − c, 1 + c]
    gray_probability: float = 0.0

    @property
    def changes_colors(self) -> bool:
        return self.color_jitter > 0 or self.gray_probability > 0


# What `embed --view-kind strong` draws views by.
STRONG = Augmentation(crop_scale=0.3, color_jitter=0.4, gray_probability=0.2)


@dataclasses.dataclass(frozen=True)
class View:
    """How an image is shown."""

    box: Box  # left, top, right, bottom of the crop, in pixels of the image at its full size
    colors: npt.NDArray[np.float32]  # [3, 4], see `apply_colors`

    def pack(self) -> npt.NDArray[np.float32]:
        """Return it as float32 [16]: the box, then the colour map row by row. Box edges are whole numbers below 2²⁴."""
        return np.concatenate([np.array(self.box, dtype=np.float32), self.colors.ravel()])

    @classmethod
    def unpack(cls, packed: npt.NDArray[np.float32]) -> View:
        left, top, right, bottom = (float(edge) for edge in packed[:4])
        return cls((left, top, right, bottom), packed[4:].reshape(3, 4))


@dataclasses.dataclass(frozen=True)
class MixedView:
    """How two images are shown as one, λ·first + (1 − λ)·second; at λ = 1 the first alone.

    Source: Zhang et al. 2018 (mixup, arXiv 1710.09412).
    """

    first: View
    weight: float  # λ, in [½, 1], a float32 number
    partner: float  # place of the other image, from this one's in its batch or shard; NaN where that has no row
    second: View

    def pack(self) -> npt.NDArray[np.float32]:
        """Return it as float32 [34]: the first view, λ, the partner's place, the second view."""
        between = np.array([self.weight, self.partner], dtype=np.float32)
        return np.concatenate([self.first.pack(), between, self.second.pack()])

    @classmethod
    def unpack(cls, packed: npt.NDArray[np.float32]) -> MixedView:
        """Undo `pack`; of `PACKED_VIEW` numbers, a view that is not mixed."""
        first = View.unpack(packed[:PACKED_VIEW])
        if len(packed) == PACKED_VIEW:
            return cls(first, 1.0, 0.0, first)
        weight, partner = packed[PACKED_VIEW : PACKED_VIEW + 2]
        return cls(first, float(weight), float(partner), View.unpack(packed[PACKED_VIEW + 2 :]))


def identity_colors() -> npt.NDArray[np.float32]:
    """Return the colour map that changes nothing, float32 [3, 4]."""
    return np.eye(3, 4, dtype=np.float32)


def apply_colors(pixels: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """Apply a colour map, float32 [B, 3, 4], to each image: out = map[:, :3] · rgb + 255 · map[:, 3].

    Pixels, in and out, are [B, H, W, 3] in 0…255; those that come out are float32.
    """
    batch, height, width, _ = pixels.shape
    flat = pixels.reshape(batch, height * width, 3).float()
    mapped = torch.baddbmm(255 * colors[:, None, :, 3], flat, colors[:, :, :3].transpose(1, 2))
    return mapped.clamp_(0, 255).view(batch, height, width, 3)


def mix_pixels(view: MixedView, first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Mix the crops of two images, [H, W, 3], each in its colours, which are final then; the same bytes on any machine."""
    weight = np.float32(view.weight)
    mixed = weight * _colored(first, view.first.colors) + (1 - weight) * _colored(second, view.second.colors)
    return np.rint(mixed).astype(np.uint8)


def _colored(pixels: npt.NDArray[np.uint8], colors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Apply a colour map, as `apply_colors` does; sums of products in a fixed order."""
    red, green, blue = np.moveaxis(pixels.astype(np.float32), 2, 0)
    rows = [row[0] * red + row[1] * green + row[2] * blue + 255 * row[3] for row in colors]
    return np.stack(rows, axis=2).clip(0, 255)


def choose_view(augmentation: Augmentation, width: int, height: int, seed: int) -> View:
    """Draw a view; its crop as torchvision's RandomResizedCrop, area in [crop_scale, 1] and aspect ratio in [3/4, 4/3]."""
    random = np.random.default_rng(seed)
    box = _choose_box(width, height, augmentation.crop_scale, random)
    return View(box, _choose_colors(augmentation, random))


@dataclasses.dataclass(frozen=True)
class ViewPixels:
    """Renders a view of an image for a model of that PreprocessCfg (size, interpolation); picklable."""

    preprocess: dict[str, Any]

    def __call__(self, image: Image.Image, view: View) -> npt.NDArray[np.uint8]:
        """Crop, and resize to uint8 [H, W, 3] of the model's size, whatever the crop's shape; colours are left."""
        name = self.preprocess.get("interpolation", "bicubic").upper()  # open_clip also knows "random"
        resampling = getattr(Image.Resampling, name, Image.Resampling.BICUBIC)
        box, full = view.box, full_size(image)
        if full != image.size:
            sides = zip(box, full * 2, image.size * 2, strict=True)
            box = cast(Box, tuple(min(edge * here / there, here) for edge, there, here in sides))
        return np.asarray(image.resize(self.size, resampling, box=box))

    @property
    def size(self) -> tuple[int, int]:
        size = self.preprocess["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return width, height

    def draft_size(self, augmentation: Augmentation) -> tuple[int, int]:
        """Return the least width and height to decode, of which a crop of the smallest area has twice those of the model."""
        width, height = (math.ceil(2 * side / math.sqrt(augmentation.crop_scale)) for side in self.size)
        return width, height


@dataclasses.dataclass(frozen=True)
class Processor:
    """How one model takes images (as a view shows them, at the model's size) and captions; picklable."""

    pixels: ViewPixels
    tokenizer: Tokenizer

    @classmethod
    def of(cls, model: ClipModel) -> Processor:
        return cls(ViewPixels(model.info.preprocess), model.tokenizer)


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
