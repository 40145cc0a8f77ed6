"""Tars and images from strangers: names that are paths, links and devices, forms that start programs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import make_image, shard_members, write_tar
from hostile_files import special, tar_of
from hostile_place import Place, few
from PIL import Image

_ANY = ("--max-bad-fraction", 1, "--json")
_LONGEST = 2**20 - 2**12  # longer headers are refused


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


@pytest.mark.parametrize("part", few(1, ["a/", "a", "a./", "__a/", "/"]))
def test_a_name_of_a_megabyte_takes_no_time(place: Place, tiny_model: Path, part: str) -> None:
    name = part * (_LONGEST // len(part))
    path = tar_of(place.data / "0.tar", [*shard_members(0, 4), (name, b"x"), (f"{name}.png", make_image(9))])
    outcome = place.run("embed", path, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome


def test_links_devices_and_paths_make_no_files_elsewhere(place: Place, tiny_model: Path) -> None:
    """Also of new shards, which hold members byte for byte."""
    up = "../" * 8
    odd = [
        special("100.png", tarfile.SYMTYPE, str(place.private)),
        special("101.png", tarfile.LNKTYPE, f"{up}{place.private}"),
        special("102.png", tarfile.CHRTYPE),
        special("103.png", tarfile.BLKTYPE),
        special("104.png", tarfile.FIFOTYPE),
        special("105.png", tarfile.DIRTYPE),
        special("106.png", tarfile.CONTTYPE),
        special("dir", tarfile.SYMTYPE, str(place.home)),
    ]
    texts = [
        (f"{name}.{suffix}", data)
        for name in (f"{place.home}/evil", f"{up}evil", "dir/evil", "..", f"a/{up}/evil", "dir/../../evil")
        for suffix, data in (("png", make_image(len(name))), ("txt", b"a caption"))
    ]
    path = tar_of(place.data / "0.tar", [*shard_members(0, 6), *odd, *texts, *shard_members(0, 2)])
    outcome = place.run("embed", path, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome
    for words in (("balance", "--keep", "0.9", "--write-shards", "made"), ("balance", "--keep", "0.8")):
        outcome = place.run(*words)
        assert not outcome.problems(), outcome
    assert {file.name for file in (place.work / "made").rglob("*") if "evil" in file.name} == set()


def _long_header(kind: bytes, size: bytes) -> bytes:
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


_HEADERS = {
    "pax": _long_header(tarfile.XHDTYPE, b"77777777777") + bytes(2**20),
    "sparse": _long_header(tarfile.GNUTYPE_SPARSE, b"77777777777") + bytes(2**16),
    "long name": _long_header(tarfile.GNUTYPE_LONGNAME, b"77777777777") + bytes(2**20),
    "global": _long_header(tarfile.XGLTYPE, b"00003777777") + b"9 a=bcd\n\n" * 2**17,
    "huge": _long_header(tarfile.REGTYPE, b"\x80" + b"\x7f" * 11) + bytes(2**16),
    "negative": _long_header(tarfile.REGTYPE, b"\xff" * 12) + bytes(2**16),
    "many": b"".join(_long_header(tarfile.XHDTYPE, b"00000000000") for _ in range(2000)),
}


@pytest.mark.parametrize("name", few(2, _HEADERS))
def test_headers_that_claim_too_much(place: Place, tiny_model: Path, name: str) -> None:
    path = place.data / "0.tar"
    path.write_bytes(_HEADERS[name] + bytes(2048))
    outcome = place.run("embed", path, "--model", tiny_model, *_ANY)
    assert not outcome.problems(), outcome


@pytest.mark.parametrize(
    "content", few(1, [b"[" * 100_000, b'{"caption":' * 50_000, b'{"caption":' + b"9" * 100_000 + b"}"])
)
def test_a_caption_of_brackets_is_a_missing_one(place: Place, tiny_model: Path, content: bytes) -> None:
    members = [
        (name, content if name == "000001.json" else json.dumps({"caption": "a caption"}).encode())
        if name.endswith(".json")
        else (name, data)
        for name, data in shard_members(0, 4, captions=False)
    ]
    path = write_tar(place.data / "0.tar", members)
    outcome = place.run("embed", path, "--model", tiny_model, "--caption-key", "json:caption", *_ANY)
    assert not outcome.problems(), outcome
    assert outcome.json["images"] == 3, outcome


def _save(form: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_image(1))).convert(mode).save(buffer, form)
    return buffer.getvalue()


_EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(touch touched) (w) file\nshowpage\n%%EOF\n"
)


def test_only_the_promised_forms_are_decoded(place: Place, tiny_model: Path) -> None:
    """The others are called as images are; one of them would start a program."""
    programs = place.root / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {place.root}/touched\n")
    (programs / "gs").chmod(0o755)
    forms = {
        "eps": _EPS,
        "eps2": _save("EPS"),
        "pdf": _save("PDF"),
        **{form: _save(form) for form in ("PCX", "SGI", "TGA", "ICO", "ICNS", "DDS", "JPEG2000", "AVIF")},
        "MSP": _save("MSP", "1"),
        "XBM": _save("XBM", "1"),
        "SPIDER": _save("SPIDER", "F"),
        "FITS": b"SIMPLE  =                    T".ljust(80)
        + b"BITPIX  =                    8".ljust(80)
        + b"NAXIS   =                    0".ljust(80)
        + b"END".ljust(2640),
        "xpm": b'/* XPM */\nstatic char * a[] = {\n"2 1 1 1",\n"a c #ff0000",\n"aa",\n};\n',
    }
    for name, content in forms.items():
        (place.data / f"{name}.jpg").write_bytes(content)
    (place.data / "honest.png").write_bytes(make_image(0))
    outcome = place.run(
        "embed", place.data, "--model", tiny_model, "--no-text", *_ANY, env={"PATH": f"{programs}:/usr/bin:/bin"}
    )
    assert not outcome.problems(), outcome
    assert not (place.root / "touched").exists(), outcome
    assert outcome.json["images"] == 1, outcome
