"""What a worker keeps between batches: decoded images and tokens. It only saves time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from clipcid_cli.runtime.models.decode import Readable, SkippedImage, read_image
from clipcid_cli.runtime.models.tokenizer import Tokenizer

# Captions whose tokens are kept.
MAX_CAPTIONS = 200_000


class ImageCache:
    """Decoded images, kept until they take a number of bytes; then no more are added."""

    def __init__(self, max_bytes: int, draft_size: tuple[int, int] | None = None) -> None:
        """Nothing is kept yet.

        Args:
            draft_size: How images are decoded, see `decode_image`.
        """
        self._bytes_left, self._draft_size = max_bytes, draft_size
        self._images: dict[str, Image.Image] = {}

    def read(self, key: str, source: Readable) -> Image.Image | SkippedImage:
        """Return the image of a sample, as `read_image` does.

        Args:
            key: The sample's key, by which its image is found again.
            source: Where its bytes come from.
        """
        kept = self._images.get(key)
        if kept is not None:
            return kept
        image = read_image(source, self._draft_size)
        if isinstance(image, SkippedImage):
            return image
        size = 3 * image.width * image.height
        if size <= self._bytes_left:
            self._bytes_left -= size
            self._images[key] = image
        return image


class TokenCache:
    """A tokenizer that keeps the tokens of the captions it has seen, of about `most` and of those of a call."""

    def __init__(self, tokenizer: Tokenizer, most: int = MAX_CAPTIONS) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._tokens: dict[str, torch.Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """Return the tokens of n captions, int64 [n, L]."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._tokens]
        if new:
            if len(self._tokens) > self._most:
                self._tokens.clear()
                new = list(dict.fromkeys(captions))
            self._tokens.update(zip(new, self._tokenizer(new), strict=True))
        return torch.stack([self._tokens[caption] for caption in captions])
