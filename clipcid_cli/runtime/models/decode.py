"""Bytes of an image file to RGB pixels, the same way everywhere."""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from PIL import Image, TiffImagePlugin, WebPImagePlugin

from clipcid_cli.errors import TooManyBytesError

# Pillow's own warning level. It bounds what one image can cost: 89 M pixels are 268 MB as RGB.
MAX_PIXELS = 89_478_485

# The formats that are decoded, whatever a file is called. Pillow knows forty, one of which runs Ghostscript.
# Two of their modules are imported above: Pillow would look for them by importing all forty.
_FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "PPM",
    WebPImagePlugin.WebPImageFile.format,
    TiffImagePlugin.TiffImageFile.format,
)
_STRIP = 2**20  # pixels that are converted at a time, where that takes several copies of them

# Names in the `info` of an image, where Pillow also puts a file's own texts under the file's own names: those are Latin-1.
_FULL_SIZE, _FLATTENED, _SCALED = "→ full size", "→ flattened", "→ scaled"
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class Readable(Protocol):
    """Where the bytes of an image file come from; `formats.data.samples.ByteRange` is one."""

    def read(self) -> bytes:
        """Return the bytes; OSError when they cannot be read."""


@dataclasses.dataclass(frozen=True)
class SkippedImage:
    """The result for an image that cannot be used."""

    # A key of `formats.skips.REASONS`: `not_found`, `http_error`, `unreadable_image`, `too_many_pixels` or `too_many_bytes`;
    # after a colon details may follow.
    reason: str


def read_image(source: Readable, draft_size: tuple[int, int] | None = None) -> Image.Image | SkippedImage:
    """Read and decode an image, see `decode_image`; every step learns here that a sample has to be skipped, and why."""
    try:
        return decode_image(source.read(), draft_size)
    except TooManyBytesError:
        return SkippedImage("too_many_bytes")
    except FileNotFoundError as error:
        return SkippedImage("not_found" if error.filename is None else f"not_found: {error.filename}")
    except OSError as error:  # the file was truncated after it was listed, or a server does not send it
        answer = getattr(error, "answer", None)
        return SkippedImage("unreadable_image" if answer is None else f"http_error: {answer}")


def decode_image(data: bytes, draft_size: tuple[int, int] | None = None) -> Image.Image | SkippedImage:
    """Decode the bytes of an image file to RGB; `had_alpha`, `was_16_bit` and `full_size` tell what else is known of it.

    EXIF orientation is ignored, as in open_clip. Transparent pixels are shown on white, where open_clip would show the
    colour stored under them, and 16-bit grey is scaled, where open_clip would cut it off at 255. Of an animation the first
    frame is taken.

    Args:
        draft_size: Minimal (width, height) of the decoded image; a JPEG is decoded at ½, ¼ or ⅛ of its size where that is
            large enough. None decodes at full size.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged metadata, which is not used.
            warnings.simplefilter("ignore")
            image = _open(data)
            if image.width * image.height > MAX_PIXELS:
                return SkippedImage("too_many_pixels")
            if draft_size is not None:
                size = image.size
                image.draft("RGB", draft_size)
                image.info[_FULL_SIZE] = size
            image.load()
            return _to_rgb(image)
    except Image.DecompressionBombError:  # Pillow's own limit, twice the default above
        return SkippedImage("too_many_pixels")
    except Exception:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        return SkippedImage("unreadable_image")


def read_size(source: Readable) -> tuple[int, int] | SkippedImage:
    """Read an image's (width, height) from its header, without decoding it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _open(source.read()).size
    except TooManyBytesError:
        return SkippedImage("too_many_bytes")
    except Exception:  # as in read_image and decode_image
        return SkippedImage("unreadable_image")


def _open(data: bytes) -> Image.Image:
    """Open the bytes of an image file, reading no more than its header; every image of the package is opened here."""
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def had_alpha(image: Image.Image) -> bool:
    """Tell whether `decode_image` found transparent pixels, which it shows on white."""
    return bool(image.info.get(_FLATTENED, False))


def was_16_bit(image: Image.Image) -> bool:
    """Tell whether `decode_image` scaled the image from 16 bits of grey."""
    return bool(image.info.get(_SCALED, False))


def full_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) that an image of `decode_image` has in its file."""
    size: tuple[int, int] = image.info.get(_FULL_SIZE, image.size)
    return size


def _to_rgb(image: Image.Image) -> Image.Image:
    # Of a PNG or PGM, mode I is 16 bits too.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _scale(image)
    if isinstance(image.info.get("transparency"), str):  # a text of the file's own
        del image.info["transparency"]
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        return _flatten(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale(image: Image.Image) -> Image.Image:
    """Scale an image of 16 bits of grey to 8."""
    scaled = Image.new("RGB", image.size)
    for top, strip in _cut(image):
        levels = (np.asarray(strip).astype(np.int32) + 128) // 257
        scaled.paste(Image.fromarray(levels.astype(np.uint8)).convert("RGB"), (0, top))
    scaled.info[_SCALED] = True
    return scaled


def _flatten(image: Image.Image) -> Image.Image:
    """Lay an image with transparent pixels on white."""
    flat = Image.new("RGB", image.size, (255, 255, 255))
    for top, strip in _cut(image):
        layered = strip.convert("RGBA")
        alpha = layered.getchannel("A")
        flat.paste(layered, (0, top), mask=alpha)
        if alpha.getextrema() != (255, 255):
            flat.info[_FLATTENED] = True
    return flat


def _cut(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in strips of `_STRIP` pixels, each with the number of its first row."""
    height = max(1, _STRIP // image.width)
    if height >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(top + height, image.height)))


class ImageCache:
    """Decoded images that a worker keeps between epochs, up to a number of bytes. It only saves time."""

    def __init__(self, max_bytes: int, draft_size: tuple[int, int] | None = None) -> None:
        """Nothing is kept yet; `draft_size` as in `decode_image`."""
        self._bytes_left = max_bytes
        self._draft_size = draft_size
        self._images = dict[str, Image.Image]()

    def read(self, key: str, source: Readable) -> Image.Image | SkippedImage:
        """Return the image of the sample `key`, as `read_image` does."""
        if key in self._images:
            return self._images[key]
        image = read_image(source, self._draft_size)
        if isinstance(image, Image.Image):
            size = 3 * image.width * image.height
            if size <= self._bytes_left:
                self._bytes_left -= size
                self._images[key] = image
        return image
