"""Bytes of images to pixels."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from clipcid_cli.formats.data.samples import ByteRange
from clipcid_cli.runtime.models.decode import (
    SkippedImage,
    decode_image,
    full_size,
    had_alpha,
    read_image,
    read_size,
    was_16_bit,
)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGB", "RGBA"])
def test_opaque_images_are_what_open_clip_sees(mode: str) -> None:
    data = encode(Image.open(io.BytesIO(make_image(3))).convert(mode), "TIFF")
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    assert np.array_equal(decoded, Image.open(io.BytesIO(data)).convert("RGB"))
    assert not had_alpha(decoded)
    assert not was_16_bit(decoded)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_of_grey_are_scaled_and_told(kind: str) -> None:
    deep = np.linspace(0, 65_535, 48 * 48).round().astype(np.uint16).reshape(48, 48)
    decoded = decode_image(encode(Image.fromarray(deep), kind))
    assert (decoded.mode, was_16_bit(decoded)) == ("RGB", True)
    np.testing.assert_array_equal(np.asarray(decoded), np.rint(deep / 257)[:, :, None].repeat(3, axis=2))


def test_transparent_pixels_are_laid_on_white_and_told() -> None:
    image = Image.new("RGBA", (4, 2), (10, 20, 30, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    decoded = decode_image(encode(image, "PNG"))
    assert had_alpha(decoded)
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [(10, 20, 30), (127, 127, 127), (255, 255, 255)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    decoded = decode_image(encode(palette, "PNG", transparency=1))
    assert had_alpha(decoded)
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(200, 0, 0), (255, 255, 255)]


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(make_image(2))).resize((40, 20))
    assert decode_image(encode(image, "JPEG", exif=exif)).size == (40, 20)


def make_bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable_image"),
        (b"no image at all", "unreadable_image"),
        (make_image(1)[:200], "unreadable_image"),
        (make_image(1, kind="JPEG")[:400], "unreadable_image"),
        (make_image(1, kind="WEBP")[:100], "unreadable_image"),
        (make_bomb(100_000, 100_000), "too_many_pixels"),
        (make_bomb(10_000, 9_000), "too_many_pixels"),
    ],
)
def test_what_cannot_be_used_has_a_reason(data: bytes, reason: str) -> None:
    assert decode_image(data) == SkippedImage(reason)


def test_a_file_is_read_or_skipped_with_a_reason(tmp_path: Path) -> None:
    place = tmp_path / "image"
    place.write_bytes(make_image(1))
    whole, missing, cut = ByteRange(str(place)), ByteRange(str(tmp_path / "gone")), ByteRange(str(place), 0, 10**6)
    image = read_image(whole)
    assert isinstance(image, Image.Image)
    assert read_size(whole) == image.size == (48, 48)
    for source in (missing, cut):
        assert read_image(source) == read_size(source) == SkippedImage("unreadable_image")
    place.write_bytes(make_bomb(10_000, 9_000))
    assert read_image(whole) == SkippedImage("too_many_pixels")
    assert read_size(whole) == (10_000, 9_000)


def test_a_draft_is_smaller_but_large_enough() -> None:
    data = make_image(4, side=512, kind="JPEG")
    full, draft = decode_image(data), decode_image(data, draft_size=(128, 128))
    assert full.size == (512, 512)
    assert draft.size == (128, 128)
    assert full_size(draft) == full_size(full) == (512, 512)
    small = np.asarray(full.resize((32, 32), Image.Resampling.BICUBIC), dtype=float)
    close = np.asarray(draft.resize((32, 32), Image.Resampling.BICUBIC), dtype=float)
    assert 0 < np.abs(small - close).mean() < 4
