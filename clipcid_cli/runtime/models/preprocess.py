"""A model's preprocessing: an image becomes bytes in the worker, and numbers on the device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from PIL import Image


@dataclasses.dataclass(frozen=True)
class PixelTransform:
    """The steps of open_clip's transform on a PIL image, then conversion to bytes."""

    steps: list[Callable[[Image.Image], Image.Image]]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image of any size to uint8 [H, W, 3], 0…255."""
        for step in self.steps:
            image = step(image)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def normalize_pixels(pixels: torch.Tensor, preprocess: dict[str, Any]) -> torch.Tensor:
    """Scale and shift a batch of bytes as torchvision's ToTensor and Normalize do.

    Args:
        pixels: uint8 [B, H, W, 3], 0…255.
        preprocess: PreprocessCfg with ``mean`` and ``std`` per channel.

    Returns:
        float32 [B, 3, H, W], contiguous, on the device of `pixels`.
    """
    mean, std = (_per_channel(tuple(preprocess[name]), pixels.device) for name in ("mean", "std"))
    channels_first = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first.div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return float32 [3, 1, 1]; kept, since every copy to a GPU makes the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def hash_preprocess(preprocess: dict[str, Any], *, fast_decode: bool) -> str:
    """Hash everything that determines the pixels a model sees.

    Args:
        fast_decode: Whether JPEGs are decoded at a reduced size.
    """
    text = json.dumps(
        {"preprocess": preprocess, "fast_decode": fast_decode, "alpha": "white", "exif": "ignored"}, sort_keys=True
    )
    return "blake2b:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
