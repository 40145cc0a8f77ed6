"""The images that an export's page searches: which are taken, their rows, and what is said of those left out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from balance_data import heard
from conftest import embed_with_open_clip, make_image, write_tar
from PIL import Image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.inputs import find_data, read_inputs
from clipcid_cli.steps.export.search import Gallery, encode_gallery, find_gallery
from clipcid_cli.steps.settings.export import ExportSettings


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(40):
        (tmp_path / f"{number:02d}.png").write_bytes(make_image(number, 40 + number))
    return tmp_path


def open_gallery(pictures: Path, **flags: Any) -> tuple[Gallery, ExportSettings]:
    settings = ExportSettings(format=("web",), search_images=str(pictures), **flags)
    gallery = find_gallery(settings)
    assert gallery is not None
    return gallery, settings


def encode(model: ClipModel, pictures: Path, **flags: Any) -> Any:
    gallery, settings = open_gallery(pictures, **flags)
    return encode_gallery(Checker(model, read_inputs(model, None, None, settings), settings), gallery)


def test_images_have_the_rows_of_the_model_in_the_order_of_the_data(
    model: ClipModel, tiny_model: Path, pictures: Path
) -> None:
    (pictures / "07.png").write_bytes(b"no image")
    with heard() as told:
        images = encode(model, pictures, max_bad_fraction=0.03)
    assert any("skipped: 1" in text and "07" in text for text in told)
    kept = [number for number in range(40) if number != 7]
    assert list(images.names) == [f"{number:02d}" for number in kept]
    assert set(images.captions) == {""}
    expected, _ = embed_with_open_clip(tiny_model, [make_image(number, 40 + number) for number in kept], ["a"])
    torch.testing.assert_close(torch.from_numpy(images.rows), expected, atol=1e-5, rtol=0)
    sizes = [Image.open(io.BytesIO(thumbnail)).width for thumbnail in images.thumbnails]
    assert sizes == [40 + number for number in kept]


def test_keys_may_repeat_across_shards(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [("a.png", make_image(shard)), ("a.txt", b"a caption")])
    compared = find_data(ExportSettings(data=str(tmp_path)))
    assert compared is not None
    assert [sample.key for shard in compared.shards for sample in shard.samples()] == ["0/a", "1/a"]
    gallery, _ = open_gallery(tmp_path)
    assert [sample.key for sample in gallery.samples] == ["0/a", "1/a"]


def test_too_many_unreadable_images_are_an_error(model: ClipModel, pictures: Path) -> None:
    (pictures / "07.png").write_bytes(b"no image")
    with pytest.raises(ClipcidError, match=r"1 of 40 samples in --search-images .* cannot be used"):
        encode(model, pictures)


def test_no_more_images_are_taken_than_allowed_and_others_are_another_search(pictures: Path) -> None:
    with heard() as told:
        gallery, _ = open_gallery(pictures, max_search_images=12)
    assert [sample.key for sample in gallery.samples] == [f"{number:02d}" for number in range(12)]
    assert any("beyond 12 are left out: --max-search-images" in text for text in told)
    with heard() as told:
        whole, _ = open_gallery(pictures)
    assert not told
    before = whole.fingerprint()
    assert gallery.fingerprint().content != before.content
    assert open_gallery(pictures)[0].fingerprint().content == before.content
    (pictures / "03.png").write_bytes(make_image(99))
    assert open_gallery(pictures)[0].fingerprint().content != before.content
