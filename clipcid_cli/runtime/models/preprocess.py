"""How a model takes images and texts: images become bytes in the worker and numbers on the device, texts become tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from PIL import Image

from clipcid_cli.errors import ClipcidError, in_one_line

Tokenizer = Callable[[list[str]], torch.Tensor]

LONGEST_TEXT = 8_192
"""Characters of a text that are tokenized: 100 for each of a CLIP's 77 tokens. What follows could hardly reach the model,
and a tokenizer's cleaning of a caption of megabytes takes minutes."""


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
    """Scale and shift bytes, [B, H, W, 3], as torchvision's ToTensor and Normalize do: float32 [B, 3, H, W], contiguous."""
    mean, std = (_per_channel(tuple(preprocess[name]), pixels.device) for name in ("mean", "std"))
    channels_first = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first.div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return float32 [3, 1, 1]; kept, since every copy to a GPU makes the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def hash_preprocess(preprocess: dict[str, Any], *, fast_decode: bool) -> str:
    """Hash everything that determines the pixels a model sees."""
    text = json.dumps(
        {"preprocess": preprocess, "fast_decode": fast_decode, "alpha": "white", "exif": "ignored"}, sort_keys=True
    )
    return "blake2b:" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class BoundedTokenizer:
    """A tokenizer that reads the first `LONGEST_TEXT` characters of each text; picklable."""

    whole: Any  # open_clip's own

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return int64 [B, L]."""
        return cast(torch.Tensor, self.whole([text[:LONGEST_TEXT] for text in texts]))


def load_tokenizer(spec: str, source: str) -> BoundedTokenizer:
    """Load a model's tokenizer from an architecture, a hub name or a ``local-dir:`` folder, as open_clip takes it."""
    from clipcid_cli.runtime.models.lean_open_clip import open_clip

    try:
        return BoundedTokenizer(open_clip.get_tokenizer(source))
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and its own
        raise ClipcidError(
            f"The tokenizer of model {spec} could not be loaded: {in_one_line(error, 400)}",
            "Put its files (tokenizer.json, tokenizer_config.json, …) in the folder of the model's configuration.",
        ) from error
