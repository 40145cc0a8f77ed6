"""The tar index against Python's tarfile, for tars of every common dialect."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.tars import read_members, validate_tar

# Long names need a GNU or pax record, or ustar's prefix; letters beyond ASCII a pax record.
NAMES = st.lists(st.text(st.sampled_from("abcxyz019._-äß漢"), min_size=1, max_size=60), min_size=1, max_size=5).map(
    "/".join
)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write(path: Path, dialect: str, members: list[tuple[str, bytes, float]]) -> list[tuple[str, int, int]]:
    """Write what the dialect can express, and list it with tarfile."""
    with tarfile.open(path, "w", format=FORMATS[dialect]) as archive:
        for name, data, time in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(data), time
            try:
                header.tobuf(FORMATS[dialect])
            except ValueError:
                continue  # ustar cannot hold this name
            archive.addfile(header, io.BytesIO(data))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with tarfile.open(path) as archive:
        return [(item.name, item.offset_data, item.size) for item in archive if item.isreg()]


@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(NAMES, st.binary(max_size=1500), st.sampled_from([0.0, 1.7e9, 1.7e9 + 0.25])), max_size=6),
)
@settings(max_examples=60)
def test_index_is_tarfiles(dialect: str, members: list[tuple[str, bytes, float]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        expected = write(path, dialect, members)
        validate_tar(path)
        found = list(read_members(path))
        assert [tuple(member[:3]) for member in found] == expected
        data = path.read_bytes()
        for member in found:
            assert data[member.offset : member.offset + member.size] in [content for _, content, _ in members]


@given(st.integers(min_value=1), st.lists(st.binary(min_size=1, max_size=1500), min_size=1, max_size=4))
@settings(max_examples=60)
def test_a_cut_tar_is_refused_or_holds_whole_members_only(cut: int, contents: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        expected = write(path, "gnu", [(f"{number}.png", data, 0.0) for number, data in enumerate(contents)])
        data = path.read_bytes()
        end = max(offset + -(-size // 512) * 512 for _, offset, size in expected)
        path.write_bytes(data[: 1 + cut % (end - 1)])
        try:
            validate_tar(path)
        except ClipcidError:
            return
        # Cut between two members: nothing tells it from a tar that was written without an end mark.
        assert path.stat().st_size % 512 == 0
        assert [tuple(member[:3]) for member in read_members(path)] == expected[: len(list(read_members(path)))]
