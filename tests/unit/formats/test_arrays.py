"""Arrays in mapped files: their disk space is reserved, and a disk without room for them is an error."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import create_mapped, map_strings, spool_arrays
from clipcid_cli.formats.embeddings.rows import create_copy

INT64 = np.dtype(np.int64)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files that this process writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: create_mapped(folder / "array", INT64, (1000, 2)),
        lambda folder: create_mapped(folder, INT64, (1000, 2), unnamed=True),
        lambda folder: create_copy(folder, 0, 1000, 8),
    ],
)
def test_a_disk_without_room_is_an_error_that_names_the_place(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    with largest_file(4096), pytest.raises(ClipcidError, match=f"^Could not write {re.escape(str(tmp_path))}"):
        make(tmp_path)


def test_arrays_that_come_in_parts(tmp_path: Path) -> None:
    numbers = np.arange(2000, dtype=np.int32)
    kinds = (np.int32, np.int64)
    found = spool_arrays(tmp_path, kinds, [(numbers, numbers[::2]), (numbers, numbers[:0]), (numbers[:0], numbers[:2])])
    assert [(part.tolist(), part.dtype) for part in found] == [
        ([*numbers, *numbers], np.int32),
        ([*numbers[::2], 0, 1], np.int64),
    ]
    assert [part.shape for part in spool_arrays(tmp_path, kinds, [])] == [(0,), (0,)]
    with (
        largest_file(4096),
        pytest.raises(ClipcidError, match=f"^Could not write {re.escape(str(tmp_path))}: File too"),
    ):
        spool_arrays(tmp_path, kinds, [(numbers, numbers)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_fallocate", [True, False])
def test_arrays_are_zeros_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_fallocate: bool
) -> None:
    """Also on systems that cannot reserve space, as macOS."""
    if not has_fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    for array in (
        create_mapped(tmp_path / "array", INT64, (3, 2)),
        create_mapped(tmp_path, INT64, (3, 2), unnamed=True),
    ):
        assert (array.shape, array.dtype) == ((3, 2), INT64)
        assert not array.any()
        array[:] = 7
        assert array.sum() == 42
    assert [path.name for path in tmp_path.iterdir()] == ["array"]
    assert np.fromfile(tmp_path / "array", INT64).tolist() == [7] * 6
    assert create_mapped(tmp_path, INT64, (0, 2), unnamed=True).shape == (0, 2)


def test_a_file_in_place_of_the_folder_of_copies_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".grouped").touch()
    with pytest.raises(ClipcidError, match=r"^Could not write .*/\.grouped: File exists"):
        create_copy(tmp_path, 0, 10, 8)


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["a", "", "ü b", "c" * 3000]])
def test_strings_come_back_from_the_disk(tmp_path: Path, texts: list[str]) -> None:
    sliced = pa.array(["before", *texts, "after"]).slice(1, len(texts))
    found = map_strings(tmp_path, [sliced, pa.array([], pa.large_string()), pa.array(texts, pa.large_string())])
    found.validate(full=True)
    assert found.to_pylist() == texts * 2
    assert list(tmp_path.iterdir()) == []
