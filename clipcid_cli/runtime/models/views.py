"""Views: parts of images, in changed colours.

A view is a crop box in the image's own pixels and a colour map: numbers that show any model, at whatever size it takes, the
same part of the image in the same colours. Crops are made by the workers; colours are changed with the normalisation.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

Box = tuple[float, float, float, float]

PACKED_VIEW = 16  # numbers of a packed view
PACKED_MIX = 2 * PACKED_VIEW + 2  # numbers of one that may be mixed
PARTNER = PACKED_VIEW + 1  # which of these is the partner's place


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
