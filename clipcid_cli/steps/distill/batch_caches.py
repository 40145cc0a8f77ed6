"""What a worker keeps between batches: decoded images and tokens. It only saves time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.runtime.models.clip_model import Tokenizer
from clipcid_cli.runtime.models.decode import SkippedImage, read_image

# Captions whose tokens are remembered.
TOKENS_KEPT = 200_000


class ImageCache:
    """Decoded images, kept until a number of bytes is reached; then no more are added."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._images: dict[str, Image.Image] = {}

    def decode(self, sample: Sample, bad: list[tuple[str, str]]) -> Image.Image | None:
        """Return the sample's image; None, and noted in `bad`, when it cannot be decoded."""
        kept = self._images.get(sample.key)
        if kept is not None:
            return kept
        image = read_image(sample.image)
        if isinstance(image, SkippedImage):
            bad.append((image.reason, sample.key))
            return None
        size = 3 * image.width * image.height
        if size <= self._left:
            self._left -= size
            self._images[sample.key] = image
        return image


class TokenCache:
    """A tokenizer that remembers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: dict[str, torch.Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the tokens of n captions, int64 [n, L]."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._tokens]
        if new:
            if len(self._tokens) > TOKENS_KEPT:
                self._tokens.clear()
                new = list(dict.fromkeys(captions))
            self._tokens.update(zip(new, self._tokenizer(new), strict=True))
        return torch.stack([self._tokens[caption] for caption in captions])
