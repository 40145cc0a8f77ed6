"""Rows joined by key and repeated keys found, against a dictionary: in the order of the data or another."""

from __future__ import annotations

import os
import resource
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import limited
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import join as module
from clipcid_cli.formats.join import Keys, Listing, Repeat, Values, find_repeat, join

KEYS = st.text(st.sampled_from("ab0é/"), max_size=4)


def in_parts(keys: list[str], size: int) -> Keys:
    parts = [keys[first : first + size] for first in range(0, len(keys), size)]
    return lambda: (pa.chunked_array([part], pa.string()) for part in parts)


def listing(keys: list[str], chunk: int) -> Listing:
    """Number the keys of a file by their rows and by ten times as much."""

    def read() -> Iterator[tuple[pa.Array, Values]]:
        for first in range(0, len(keys), chunk):
            part = keys[first : first + chunk]
            rows = np.arange(first, first + len(part))
            yield pa.array(part, pa.large_string()), np.stack([rows, 10 * rows], axis=1)

    return Listing(Path("list.parquet"), read, 2)


def expected(keys: list[str], listed: list[str]) -> list[list[int]]:
    rows = {key: row for row, key in enumerate(listed)}
    return [[rows[key], 10 * rows[key]] if key in rows else [-1, -1] for key in keys]


def refuse_duckdb(*_: object, **__: object) -> Iterator[pa.RecordBatch]:
    raise AssertionError("the file has the data's order")


@given(
    keys=st.lists(KEYS, max_size=30, unique=True),
    dropped=st.sets(st.integers(0, 29)),
    size=st.integers(1, 9),
    chunk=st.integers(1, 9),
)
def test_a_file_in_the_datas_order_is_read_in_step(keys: list[str], dropped: set[int], size: int, chunk: int) -> None:
    listed = [key for place, key in enumerate(keys) if place not in dropped]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_query", refuse_duckdb)
        found = join(in_parts(keys, size), len(keys), listing(listed, chunk), None)
    assert found.tolist() == expected(keys, listed)


def test_rows_in_another_order_within_a_shard_are_read_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_query", refuse_duckdb)
    found = join(in_parts(["a", "b", "c", "d"], 2), 4, listing(["b", "a", "c"], 2), None)
    assert found[:, 0].tolist() == [1, 0, 2, -1]


@given(
    keys=st.lists(KEYS, max_size=30, unique=True),
    listed=st.lists(KEYS, max_size=30, unique=True),
    size=st.integers(1, 9),
    chunk=st.integers(1, 9),
)
@settings(max_examples=20)
def test_a_join_is_a_dictionary(keys: list[str], listed: list[str], size: int, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = join(in_parts(keys, size), len(keys), listing(listed, chunk), Path(folder))
        assert list(Path(folder).iterdir()) == []
    assert found.dtype == np.int64
    assert found.tolist() == expected(keys, listed)


@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_a_key_that_a_file_has_twice_is_refused(chunk: int, tmp_path: Path) -> None:
    listed = ["c", "b", "x", "x", "b", "c"]
    with pytest.raises(ClipcidError, match=r"Key 'b' occurs in row 1 and again in row 4 of list\.parquet"):
        join(in_parts(["a", "b", "c"], 2), 3, listing(listed, chunk), tmp_path)
    # One that no sample has may be there twice.
    assert join(in_parts(["a", "b"], 2), 2, listing(["x", "b", "x"], chunk), tmp_path)[:, 0].tolist() == [-1, 1]


@pytest.mark.parametrize("few", [0, 2**20])
@given(keys=st.lists(KEYS, max_size=12), size=st.integers(1, 5))
@settings(max_examples=15)
def test_the_first_two_rows_of_a_repeated_key_are_found(few: int, keys: list[str], size: int) -> None:
    repeated = sorted(key for key in set(keys) if keys.count(key) > 1)
    first = None
    if repeated:
        rows = [row for row, key in enumerate(keys) if key == repeated[0]]
        first = Repeat(repeated[0], rows[0], rows[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW", few)
        found = find_repeat(in_parts(keys, size), None)
    assert found == first or (found is not None and repeated and found.key in repeated)


def test_an_error_of_reading_is_raised_as_it_is(tmp_path: Path) -> None:
    def read() -> Iterator[tuple[pa.Array, Values]]:
        yield pa.array(["b"]), np.zeros((1, 1), np.int64)
        raise ClipcidError("The part is damaged.", "Make it again.")

    def keys() -> Iterator[pa.ChunkedArray]:
        yield pa.chunked_array([["a"]])

    with pytest.raises(ClipcidError, match=r"The part is damaged\.") as error:
        join(keys, 1, Listing(tmp_path / "list", read), tmp_path)
    assert error.value.fix == "Make it again."
    assert not list(tmp_path.iterdir())


def test_nobody_else_enters_the_folder_of_what_memory_does_not_hold(tmp_path: Path) -> None:
    modes = list[int]()

    def keys() -> Iterator[pa.ChunkedArray]:
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.is_dir())
        yield pa.chunked_array([["a", "a"]])

    before = os.umask(0)
    try:
        assert find_repeat(keys, tmp_path) == Repeat("a", 0, 1)
    finally:
        os.umask(before)
    assert set(modes) == {0o700}


@pytest.mark.parametrize("memory", ["1GB", "16MB"])
def test_a_disk_without_room_is_an_error_not_a_killed_process(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MEMORY", memory)
    monkeypatch.setattr(module, "_FEW_NUMBERS", 0 if memory == "1GB" else 2**30)  # the numbers, or what DuckDB writes
    keys = [f"{row:040d}" for row in range(300_000)]
    message = r"Could not write .*File too large|could not be joined in"
    with limited(resource.RLIMIT_FSIZE, 4096), pytest.raises(ClipcidError, match=message) as error:
        join(in_parts(keys, 2**16), len(keys), listing(keys[::-1], 2**16), tmp_path)
    assert "space" in error.value.fix
    assert not list(tmp_path.iterdir())


def test_a_join_beyond_its_memory_goes_on_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MEMORY", "64MB")
    monkeypatch.setattr(module, "_FEW_NUMBERS", 0)
    keys = [f"{row:0100d}" for row in range(600_000)]
    found = join(in_parts(keys, 2**14), len(keys), listing(keys[::-1], 2**14), tmp_path)
    assert np.array_equal(found[:, 0], np.arange(len(keys))[::-1])
    assert not list(tmp_path.iterdir())
