"""Files matched with the shards of a data set: in its order or not, against a dictionary."""

from __future__ import annotations

import resource
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import key_streams
from clipcid_cli.formats.key_join import hash_keys
from clipcid_cli.formats.key_streams import KeyStream, OrderedMatch, Values, join_stream, parquet_keys

KEYS = st.text(st.sampled_from("ab0é/"), max_size=4)


def hash_badly(keys: pa.ChunkedArray, variant: int = 0) -> npt.NDArray[np.uint64]:
    """Hash to the length, so that most different keys collide; the check is honest."""
    if variant:
        return hash_keys(keys, variant)
    return np.array([len(key.as_py()) for key in keys], dtype=np.uint64) << np.uint64(61)


def strings(keys: list[str]) -> pa.Array:
    return pa.array(keys, pa.large_string())


def stream(keys: list[str], chunk: int) -> KeyStream:
    """Number the keys of a file by their rows and by ten times as much."""

    def read() -> Iterator[tuple[pa.Array, Values]]:
        for first in range(0, len(keys), chunk):
            part = keys[first : first + chunk]
            rows = np.arange(first, first + len(part))
            yield strings(part), np.stack([rows, 10 * rows], axis=1)

    return read


def cut(keys: list[str], size: int) -> list[list[str]]:
    return [keys[first : first + size] for first in range(0, len(keys), size)]


@given(
    keys=st.lists(KEYS, max_size=30, unique=True),
    dropped=st.sets(st.integers(0, 29)),
    size=st.integers(1, 9),
    chunk=st.integers(1, 9),
)
def test_a_file_in_the_datas_order_is_matched_in_step(
    keys: list[str], dropped: set[int], size: int, chunk: int
) -> None:
    listed = [key for place, key in enumerate(keys) if place not in dropped]
    rows = {key: row for row, key in enumerate(listed)}
    match = OrderedMatch(stream(listed, chunk), 2)
    found = [values for shard in cut(keys, size) for values in match.match(strings(shard)).tolist()]
    assert match.is_complete()
    assert found == [[rows[key], 10 * rows[key]] if key in rows else [-1, -1] for key in keys]


@pytest.mark.parametrize(
    "listed",
    [
        ["a", "c", "d", "b"],  # in another order
        ["a", "b", "x", "c"],  # with a key of other data
        ["a", "a", "b"],  # twice within a shard
        ["a", "b", "c", "a"],  # and across shards
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_any_other_file_is_noticed(listed: list[str], chunk: int) -> None:
    match = OrderedMatch(stream(listed, chunk), 2)
    for shard in (["a", "b"], ["c", "d"]):
        match.match(strings(shard))
    assert not match.is_complete()


def test_rows_in_another_order_within_a_shard_are_in_its_order() -> None:
    match = OrderedMatch(stream(["b", "a", "c"], 2), 2)
    assert match.match(strings(["a", "b"]))[:, 0].tolist() == [1, 0]
    assert match.match(strings(["c", "d"]))[:, 0].tolist() == [2, -1]
    assert match.is_complete()


@pytest.mark.parametrize("bad", [False, True])
@given(
    keys=st.lists(KEYS, max_size=30, unique=True),
    listed=st.lists(KEYS, max_size=30, unique=True),
    size=st.integers(1, 9),
    chunk=st.integers(1, 9),
)
@settings(max_examples=60)
def test_a_join_is_a_dictionary(bad: bool, keys: list[str], listed: list[str], size: int, chunk: int) -> None:
    rows = {key: row for row, key in enumerate(listed)}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(key_streams, "_SORTED_AT_ONCE", 4)
        patch.setattr(key_streams, "_READ_AT_ONCE", 3)
        if bad:
            patch.setattr(key_streams, "hash_keys", hash_badly)
        shards = map(strings, cut(keys, size))
        found = join_stream(shards, len(keys), stream(listed, chunk), 2, Path(folder), Path("keys")).tolist()
    assert found == [[rows[key], 10 * rows[key]] if key in rows else [-1, -1] for key in keys]


@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_a_key_that_a_file_has_twice_is_refused(chunk: int, tmp_path: Path) -> None:
    listed = ["c", "b", "x", "x", "b", "c"]  # x, which no sample has, may repeat
    with pytest.raises(ClipcidError, match=r"Key 'b' occurs in row 1 and again in row 4 of list\.parquet"):
        join_stream([strings(["a", "b"]), strings(["c"])], 3, stream(listed, chunk), 2, tmp_path, Path("list.parquet"))


def test_a_disk_without_room_is_an_error_not_a_killed_process(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ClipcidError, match=r"Could not write .*values: File too large"):
            join_stream([strings(["a"] * 1000)], 1000, stream(["a"], 1), 1, tmp_path, Path("list.parquet"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(tmp_path.iterdir())


def test_parquet_is_read_with_its_rows_or_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_streams, "_ROWS_OF_PARQUET", 2)
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"key": ["a", "b", "c"], "kept": [True, False, True], "other": [0.5, 0.5, 0.5]}), path)
    for value, expected in ((None, [0, 1, 2]), ("kept", [1, 0, 1])):
        chunks = list(parquet_keys(path, value)())
        assert [key for keys, _ in chunks for key in keys.to_pylist()] == ["a", "b", "c"]
        assert [int(number) for _, numbers in chunks for number in numbers[:, 0]] == expected
