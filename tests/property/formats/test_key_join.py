"""Joining by key against a dictionary, with honest and with colliding hashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats import key_join
from clipcid_cli.formats.key_join import find_repeated_key, hash_keys, join_keys, mark_repeats

KEYS = st.text(st.sampled_from("ab0é/"), max_size=4)


def hash_badly(keys: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Hash to the length, so that most different keys collide."""
    return np.array([len(key.as_py()) for key in keys], dtype=np.uint64)


@pytest.mark.parametrize("bad", [False, True])
@given(left=st.lists(KEYS, max_size=12), right=st.lists(KEYS, max_size=12, unique=True))
@settings(max_examples=80)
def test_positions_are_a_dictionarys(bad: bool, left: list[str], right: list[str]) -> None:
    places = {key: place for place, key in enumerate(right)}
    with pytest.MonkeyPatch.context() as patch:
        if bad:
            patch.setattr(key_join, "hash_keys", hash_badly)
        found = join_keys(left, pa.chunked_array([right[:3], right[3:]], type=pa.string()))
    assert found.dtype == np.int64
    assert found.tolist() == [places.get(key, -1) for key in left]


@pytest.mark.parametrize("bad", [False, True])
@given(keys=st.lists(KEYS, max_size=12))
@settings(max_examples=80)
def test_the_first_repeat_is_found(bad: bool, keys: list[str]) -> None:
    expected, seen = None, dict[str, int]()
    for place, key in enumerate(keys):
        if key in seen:
            expected = (key, seen[key], place)
            break
        seen[key] = place
    with pytest.MonkeyPatch.context() as patch:
        if bad:
            patch.setattr(key_join, "hash_keys", hash_badly)
        assert find_repeated_key(keys) == expected
        assert mark_repeats(keys).tolist() == [key in keys[:place] for place, key in enumerate(keys)]


def test_names_that_are_not_utf8_are_keys_too() -> None:
    assert mark_repeats(["a\udcff", "a", "a\udcff", "a\udcfe"]).tolist() == [False, False, True, False]


def test_a_repeated_key_on_the_right_is_refused() -> None:
    with pytest.raises(ClipcidError, match="Key 'b' occurs in row 1 and again in row 3"):
        join_keys(["a"], ["a", "b", "c", "b"])


@given(keys=st.lists(st.text(max_size=30), max_size=20, unique=True), cut=st.integers(0, 20))
def test_hashes_are_of_the_text_alone(keys: list[str], cut: int) -> None:
    alone = [hash_keys(pa.chunked_array([[key]], type=pa.string()))[0] for key in keys]
    column = pa.array(keys, pa.large_string())
    assert hash_keys(pa.chunked_array([column.slice(cut), column])).tolist() == alone[cut:] + alone
    assert len(set(alone)) == len(keys)


def test_hashes_are_the_same_on_every_machine() -> None:
    assert hash_keys(pa.chunked_array([["", "a", "12345678", "123456789"]], type=pa.large_string())).tolist() == [
        16294208416658607535,
        6774081908283191102,
        9501447833425779875,
        9003943604911055402,
    ]


def test_keys_are_checked_without_importing_pandas(tmp_path: Path) -> None:
    script = "from clipcid_cli.formats.key_join import mark_repeats as mark; mark(['a']); import sys; "
    script += "sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == 0


def test_hashes_do_not_depend_on_how_the_column_is_cut() -> None:
    keys = [f"{number:05d}" for number in range(100)]
    whole = pa.chunked_array([pa.array(keys, pa.large_string())])
    parts = pa.chunked_array([pa.array(keys[:40], pa.large_string()), pa.array(keys[40:], pa.large_string())])
    assert np.array_equal(hash_keys(whole), hash_keys(parts))
    assert len(set(hash_keys(whole).tolist())) == 100
