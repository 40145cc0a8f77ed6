"""Bytes of images to pixels, as open_clip sees them, and the views of them that a student is shown."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from clipcid_cli.formats.data.samples import ByteRange
from clipcid_cli.runtime.models.augment import Augmentation, choose_view
from clipcid_cli.runtime.models.decode import (
    SkippedImage,
    decode_image,
    full_size,
    had_alpha,
    read_image,
    read_size,
    was_16_bit,
)
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.models.views import View, apply_colors


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


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_texts_in_a_file_are_not_what_decoding_tells(mode: str) -> None:
    texts = PngImagePlugin.PngInfo()
    for name in ("transparency", "full_size", "flattened", "scaled", "â full size", "â flattened", "â scaled"):
        texts.add_text(name, "yes")
    decoded = decode_image(encode(Image.new(mode, (6, 4)), "PNG", pnginfo=texts))
    assert (full_size(decoded), had_alpha(decoded), was_16_bit(decoded)) == ((6, 4), False, False)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_of_grey_are_scaled_and_told(kind: str) -> None:
    deep = np.linspace(0, 65_535, 48 * 48).round().astype(np.uint16).reshape(48, 48)
    decoded = decode_image(encode(Image.fromarray(deep), kind))
    assert (decoded.mode, was_16_bit(decoded)) == ("RGB", True)
    np.testing.assert_array_equal(np.asarray(decoded), np.rint(deep / 257)[:, :, None].repeat(3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_formats_that_are_promised_are_decoded(kind: str) -> None:
    assert decode_image(encode(picture(), kind)).size == (60, 44)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "ICO", "SGI", "JPEG2000"])
def test_other_formats_are_unreadable_images(kind: str) -> None:
    data = encode(picture(), kind)
    assert decode_image(data) == SkippedImage("unreadable_image")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_large_images_are_converted_in_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.arange(60 * 44, dtype=np.uint16).reshape(44, 60)
    image = Image.fromarray(columns * 24) if mode == "I;16" else picture().convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((columns % 256).astype(np.uint8)))
    data = encode(image, "PNG", **{"transparency": image.getpixel((30, 22))} if mode == "P" else {})
    whole = decode_image(data)
    monkeypatch.setattr("clipcid_cli.runtime.models.decode._STRIP", 60 * 7)
    cut = decode_image(data)
    assert np.array_equal(cut, whole)
    assert (
        (had_alpha(cut), was_16_bit(cut)) == (had_alpha(whole), was_16_bit(whole)) == (mode != "I;16", mode == "I;16")
    )


_PEAK = """
import resource, sys
from clipcid_cli.runtime.models.decode import decode_image
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = sys.stdin.buffer.read()
before = peak()
assert decode_image(data).size == (9_400, 9_400)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_the_largest_image_takes_less_than_800_megabytes(mode: str) -> None:
    data = encode(Image.new(mode, (9_400, 9_400)), "PNG")
    answer = subprocess.run([sys.executable, "-c", _PEAK], input=data, capture_output=True, check=True)
    assert int(answer.stdout) < 800_000


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
    """A file that claims a size and holds nothing of it."""
    return b"P6 %d %d 255\n" % (width, height)


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
    for source, reason in ((missing, f"not_found: {missing.path}"), (cut, "unreadable_image")):
        assert read_image(source) == SkippedImage(reason)
        assert read_size(source) == SkippedImage("unreadable_image")
    limit = place.stat().st_size - 1
    for source in (ByteRange(str(place), max_bytes=limit), ByteRange(str(place), 0, limit + 1, max_bytes=limit)):
        assert read_image(source) == read_size(source) == SkippedImage("too_many_bytes")
    place.write_bytes(make_bomb(10_000, 9_000))
    assert read_image(whole) == SkippedImage("too_many_pixels")
    assert read_size(whole) == (10_000, 9_000)


PIXELS = Renderer({"size": 32, "interpolation": "bicubic"})


def vary(image: Image.Image, augmentation: Augmentation, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a view of an image; its pixels and colour map."""
    view = choose_view(augmentation, image.width, image.height, seed)
    return PIXELS(image, view), view.colors


def picture(width: int = 60, height: int = 44) -> Image.Image:
    return Image.open(io.BytesIO(make_image(3, 64))).convert("RGB").resize((width, height))


def test_without_variation_it_is_the_whole_image_and_the_identity() -> None:
    found, colors = vary(picture(), Augmentation(crop_scale=1.0), 0)
    assert np.array_equal(found, np.asarray(picture().resize((32, 32), Image.Resampling.BICUBIC)))
    batch = torch.from_numpy(found.copy())[None]
    torch.testing.assert_close(apply_colors(batch, torch.from_numpy(colors)[None]), batch.float())


@given(width=st.integers(1, 200), height=st.integers(1, 200), crop=st.floats(0.01, 1.0), seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_a_view_of_any_image_has_the_size_asked_for_and_survives_as_sixteen_numbers(
    width: int, height: int, crop: float, seed: int
) -> None:
    view = choose_view(Augmentation(crop, 0.5, 0.1), 100 * width, 100 * height, seed)
    packed = view.pack()
    assert (packed.shape, packed.dtype) == ((16,), np.float32)
    again = View.unpack(packed)
    assert again.box == view.box
    assert np.array_equal(again.colors, view.colors)
    found, colors = vary(Image.new("RGB", (width, height), "red"), Augmentation(crop), seed)
    assert (found.shape, found.dtype, colors.shape) == ((32, 32, 3), np.uint8, (3, 4))
    assert (found == (255, 0, 0)).all(), "nothing from outside the image"


@pytest.mark.parametrize(("crop_scale", "decoded"), [(1.0, (82, 75)), (0.08, (325, 300))])
def test_a_draft_shows_the_view_of_the_whole_image(crop_scale: float, decoded: tuple[int, int]) -> None:
    augmentation = Augmentation(crop_scale)
    buffer = io.BytesIO()
    picture(650, 600).save(buffer, "JPEG")
    whole, draft = (
        decode_image(buffer.getvalue(), draft_size=size) for size in (None, PIXELS.draft_size(augmentation.crop_scale))
    )
    assert (whole.size, draft.size) == ((650, 600), decoded)
    for seed in range(8):
        view = choose_view(augmentation, *full_size(draft), seed)
        assert view.pack().tolist() == choose_view(augmentation, *whole.size, seed).pack().tolist()
        difference = np.abs(PIXELS(draft, view).astype(int) - PIXELS(whole, view))
        assert difference.mean() < 1.5
