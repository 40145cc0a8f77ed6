"""Names in a list from elsewhere: however one is spelled and read, it leads to nothing outside the list's folder."""

from __future__ import annotations

import posixpath
import re
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.cells import Origin

LIST = Origin("sftp://host/a/list.csv")
PIECES = (
    "..",
    ".",
    "/",
    "\\",
    "\t",
    "~",
    "%2e",
    "%2E%2e",
    "%252e",
    "%2f",
    "%5c",
    "%09",
    "%25",
    "2e",
    "b",
    "1.jpg",
    "@",
    ":",
)


def readings(path: str) -> set[str]:
    """Return what servers and file systems may take a path for."""
    spellings = {path}
    while True:
        more = set[str]()
        for spelling in spellings:
            more |= {unquote(spelling), spelling.replace("\\", "/"), re.sub("[\0-\x1f]", "", spelling)}
        if more <= spellings:
            return spellings
        spellings |= more


@example("../../etc/passwd")
@example("%2e%2e/x")
@example("%25252e%25252e/x")
@example("b/.\t./.\t./x")
@example("..\\x")
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_no_spelling_leads_out_of_the_folder(name: str) -> None:
    for cell in (f"sftp://host/a/{name}", name):
        try:
            path = LIST.locate(cell)
        except ClipcidError:
            continue
        assert LIST.why_refused(path) == ""
        for reading in readings(path.removeprefix("sftp://host")):
            place = posixpath.normpath(reading)
            assert place == "/a" or place.startswith("/a/"), reading


@pytest.mark.parametrize(
    "cell", ["1.jpg", "b/1.jpg", "b/1..2.jpg", "b/100%.jpg", "sftp://host/a/b//1.jpg", "b/50%25.jpg"]
)
def test_names_beside_the_list_are_taken(cell: str) -> None:
    assert LIST.locate(cell) == (cell if "//" in cell else f"sftp://host/a/{cell}")


@pytest.mark.parametrize(
    "place", ["sftp://user@host/a", "sftp://host:22/a", "sftp://host/a@other", "SFTP://host/a", "sftp://host"]
)
def test_another_server_or_folder_is_not_beside_the_list(place: str) -> None:
    with pytest.raises(ClipcidError, match="the scheme sftp is not read from lists"):
        LIST.locate(f"{place}/1.jpg")


def test_a_bucket_that_is_called_like_a_list_is_no_folder() -> None:
    with pytest.raises(ClipcidError, match="the scheme s3 is not read from lists"):
        Origin("s3://list.csv").locate("s3://other/1.jpg")


def test_an_index_names_nothing_outside_the_folder_of_a_list_from_elsewhere() -> None:
    origin = Origin("https://host/list.csv", root="/data/images")
    assert origin.why_refused("/data/images/1.jpg") == ""
    for path in ("/etc/passwd", "/data/images/../x.jpg", "/data/images2/1.jpg"):
        assert origin.why_refused(path) == ", a file on this disk."
