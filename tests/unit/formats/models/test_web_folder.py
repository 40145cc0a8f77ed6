"""The page that searches images: which files it is, what they hold of strangers' texts, and what it may load."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_image
from PIL import Image

from clipcid_cli.formats.models.web_folder import SearchImages, read_search_rows, write_page, write_search
from clipcid_cli.formats.report import encode_thumbnail

MODEL: dict[str, Any] = {"name": "</script><b>", "canonical": False, "width": 8}
PIXELS = {"side": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
NAMES = ["a\x1b[2Jb\n/c.png", "https://me:secret@host/d.png", "</script><script>alert(1)</script>", "e" * 1000]


def make_images() -> SearchImages:
    rows = np.random.default_rng(0).standard_normal((len(NAMES), 8)).astype(np.float32)
    rows[0] = np.eye(8)[0]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    pictures = [Image.open(io.BytesIO(make_image(number, 30 + number))) for number in range(len(NAMES))]
    return SearchImages(rows, NAMES, ["", "a\tcaption"] * 2, [encode_thumbnail(picture, 32) for picture in pictures])


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    path = tmp_path / "web" / "text_encoder.onnx"
    path.parent.mkdir()
    path.write_bytes(b"encoder")
    return path


def test_a_search_is_four_files_from_which_each_image_can_be_read(encoder: Path) -> None:
    images, folder = make_images(), encoder.parent
    files = write_search(folder, MODEL, encoder, images)
    written = {path.name for path in folder.iterdir()} - {encoder.name}
    assert written == {"search.html", *(path.name for path in files)}
    assert written == {"search.html", "search_images.json", "search_rows.bin", "search_thumbnails.bin"}
    np.testing.assert_allclose(read_search_rows(folder, 8), images.rows, atol=0.51 / 32767)
    described = json.loads((folder / "search_images.json").read_text())
    packed = io.BytesIO((folder / "search_thumbnails.bin").read_bytes())
    sizes = [Image.open(io.BytesIO(packed.read(size))).size for size in described["bytes"]]
    assert sizes == [(30, 30), (31, 31), (32, 32), (32, 32)]
    assert not packed.read()


def test_names_and_captions_are_short_and_plain_and_not_in_the_page(encoder: Path) -> None:
    write_search(encoder.parent, MODEL, encoder, make_images())
    described = json.loads((encoder.parent / "search_images.json").read_text())
    assert described["names"] == [r"a\x1b[2Jb /c.png", "https://REDACTED@host/d.png", NAMES[2], "e" * 199 + "…"]
    assert described["captions"] == ["", "a caption"] * 2
    page = (encoder.parent / "search.html").read_text()
    assert "alert" not in page
    assert page.count("</script>") == page.count("<script") == 1
    assert "<b>" not in page


def test_each_page_may_run_its_own_script_and_load_from_its_folder_alone(encoder: Path) -> None:
    folder = encoder.parent
    write_search(folder, MODEL, encoder, make_images())
    write_page(folder, MODEL | PIXELS | {"logit_scale": 1.0}, [encoder, encoder], ["cat"], ["{}"], search=True)
    for page in ((folder / name).read_text() for name in ("search.html", "index.html")):
        (script,) = re.findall(r'<script type="module">(.*)</script>', page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
        assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; ")
        assert policy.endswith(
            f"script-src 'self' 'wasm-unsafe-eval' 'sha256-{digest}'; connect-src 'self'; "
            "style-src 'unsafe-inline'; img-src data: blob:"
        )


def test_a_page_leads_to_a_search_only_where_there_is_one(encoder: Path) -> None:
    for search in (False, True):
        write_page(encoder.parent, MODEL | PIXELS | {"logit_scale": 1.0}, [encoder, encoder], [], [], search=search)
        assert ("search.html" in (encoder.parent / "index.html").read_text()) == search


def test_thumbnails_are_without_the_metadata_of_their_file() -> None:
    photograph = Image.new("RGB", (400, 300), "red")
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    stored = io.BytesIO()
    photograph.save(stored, "JPEG", exif=exif, icc_profile=b"a profile " * 1000)
    small = encode_thumbnail(Image.open(stored), 192)
    opened = Image.open(io.BytesIO(small))
    assert opened.size == (192, 144)
    assert not opened.getexif()
    assert "icc_profile" not in opened.info
    assert len(small) < 1000
