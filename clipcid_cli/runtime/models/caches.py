"""Decoded images that a worker keeps between epochs. It only saves time."""

from __future__ import annotations

from PIL import Image

from clipcid_cli.runtime.models.decode import Readable, SkippedImage, read_image


class ImageCache:
    """Decoded images, kept until they take a number of bytes; then no more are added."""

    def __init__(self, max_bytes: int, draft_size: tuple[int, int] | None = None) -> None:
        """Nothing is kept yet.

        Args:
            draft_size: How images are decoded, see `decode_image`.
        """
        self._bytes_left = max_bytes
        self._draft_size = draft_size
        self._images = dict[str, Image.Image]()

    def read(self, key: str, source: Readable) -> Image.Image | SkippedImage:
        """Return the image of a sample, by whose key it is found again, as `read_image` does."""
        if key in self._images:
            return self._images[key]
        image = read_image(source, self._draft_size)
        if isinstance(image, Image.Image):
            size = 3 * image.width * image.height
            if size <= self._bytes_left:
                self._bytes_left -= size
                self._images[key] = image
        return image
