"""Training pixels: a function of the seed, crops within the image, colours as torchvision has them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipcid_cli.runtime.models.augment import Augmentation, View, ViewPixels, apply_colors, choose_view
from clipcid_cli.runtime.models.decode import decode_image, full_size

PREPROCESS = {"size": 32, "interpolation": "bicubic"}


PIXELS = ViewPixels(PREPROCESS)


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
        decode_image(buffer.getvalue(), draft_size=size) for size in (None, PIXELS.draft_size(augmentation))
    )
    assert (whole.size, draft.size) == ((650, 600), decoded)
    for seed in range(8):
        view = choose_view(augmentation, *full_size(draft), seed)
        assert view.pack().tolist() == choose_view(augmentation, *whole.size, seed).pack().tolist()
        difference = np.abs(PIXELS(draft, view).astype(int) - PIXELS(whole, view))
        assert difference.mean() < 1.5
