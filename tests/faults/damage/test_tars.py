"""Tar headers that lie: sizes that are negative or no number, broken pax records, sparse members, pipes in a tar's place."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.data.tars import read_members, validate_tar


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """Make a ustar header with the given bytes in the field of the size."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def pax(records: bytes) -> bytes:
    """Make a pax header with the given records, and a member of 4 bytes after it."""
    padded = records + bytes(-len(records) % 512)
    return header("pax", f"{len(records):011o}".encode(), b"x") + padded + header("a.png", b"00000000004") + bytes(512)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header("a.png", b"-0000001000"), "damaged at byte 0 of .*is not a size"),
        (header("a.png", b"0o000000010"), "damaged at byte 0 of .*is not a size"),
        (header("a.png", b"0000000_010"), "damaged at byte 0 of .*is not a size"),
        (header("a.png", b"00000000089"), "damaged at byte 0 of .*there is no tar header"),
        (header("a.png", b"\xff" * 12), "damaged at byte 0 of .*is not a size"),
        (header("a.png", b"\x80" + b"\xff" * 11), "truncated: a.png should end at byte"),
        (pax(b"14 size=-1536\n"), "'-1536' is not a size|invalid offset"),
        (pax(b"12 size=0x10\n"[:-1] + b"\n"), "damaged|not a size"),
        (pax(b"3000 path=b.png\n"), "its pax record is broken|invalid header"),
        (pax(b"0 path=b.png\n"), "is damaged at byte 0"),
        (pax(b"22 GNU.sparse.major=1\n"), "holds a.png as a sparse file"),
        (header("a.png", b"00000000000", b"S"), "holds a.png as a sparse file"),
        (header("name", b"07777777777", b"L"), "extended header has 1,073,741,823 bytes"),
        ((header("more", b"00000000010", b"x") + b"8 a=bcd\n".ljust(512, b"\0")) * 5_000, "is damaged at byte"),
        ((header("more", b"00000000010", b"L") + b"8 a=bcd\n".ljust(512, b"\0")) * 5_000, "is damaged at byte"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content + bytes(2048))
    with pytest.raises(ClipcidError, match=reason) as found:
        list(read_members(path))
    assert found.value.fix


def test_many_small_pax_records_take_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(pax(b"8 a=bcd\n" * 100_000) + bytes(1024))
    assert [member.name for member in read_members(path)] == ["a.png"]


def test_a_pipe_in_the_place_of_a_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    os.mkfifo(path)
    with pytest.raises(ClipcidError, match="it is a pipe or device, not a file"):
        validate_tar(path)


@pytest.mark.parametrize("content", [b"9" * 30, b"1_0", "٣".encode(), b"", b"0x1"])
def test_a_class_is_a_number_of_nine_digits_at_most(tmp_path: Path, content: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("a.png", b"x"), ("a.cls", content)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (sample,) = open_dataset(str(tmp_path)).shards[0].samples()
    assert sample.label is None
