"""Files appear whole or not at all, arrays in mapped files have their space, and a full disk is one clear error."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import limited, process_context

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import create_mapped, spool_arrays
from clipcid_cli.formats.embeddings.rows import create_copy
from clipcid_cli.formats.files import (
    atomic_file,
    link_or_copy,
    validate_writable,
    write_json,
    write_npy,
    write_text,
)
from clipcid_cli.formats.results.run_folder import append_lines

INT64 = np.dtype(np.int64)
NUMBERS = np.arange(2000, dtype=np.int32)


def test_the_old_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")
    with suppress(RuntimeError), atomic_file(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    with pytest.raises(ValueError, match="Object arrays"):
        write_npy(path, np.array([{}], dtype=object))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_the_folder_of_a_file_that_the_user_names_must_exist(tmp_path: Path) -> None:
    validate_writable(tmp_path / "c.txt")
    with pytest.raises(ClipcidError, match=r"/a/b/c\.txt: there is no folder .*/a/b\.") as caught:
        validate_writable(tmp_path / "a" / "b" / "c.txt")
    assert caught.value.fix == "Make that folder, or choose another place."
    assert os.listdir(tmp_path) == []


def test_a_file_gets_a_second_name_or_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("content")
    (tmp_path / "link").symlink_to("a")
    link_or_copy(tmp_path / "link", tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c").samefile(tmp_path / "a")
    assert not (tmp_path / "b" / "c").is_symlink()

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c").read_text() == "content"
    assert not (tmp_path / "b" / "c").samefile(tmp_path / "a")
    with pytest.raises(ClipcidError, match="missing cannot be read: No such file"):
        link_or_copy(tmp_path / "missing", tmp_path / "d")


def test_a_full_disk_is_one_clear_error_and_one_about_another_file_is_left_alone(tmp_path: Path) -> None:
    with (
        pytest.raises(ClipcidError, match=r"Could not write .*file\.bin: No space left") as caught,
        atomic_file(tmp_path / "file.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "space" in caught.value.fix
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file"):
        (tmp_path / "missing").read_bytes()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: write_npy(folder / "array.npy", NUMBERS), "/array.npy: the disk is full, or a file size limit"),
        (lambda folder: create_mapped(folder / "array", INT64, (1000, 2)), "/array: File too large"),
        (lambda folder: create_mapped(folder, INT64, (1000, 2), unnamed=True), ": File too large"),
        (lambda folder: create_copy(folder, 0, 1000, 8), "/.*: File too large"),
        (lambda folder: spool_arrays(folder, [np.int32], [(NUMBERS,)]), ": File too large"),
    ],
)
def test_a_limit_of_file_sizes_is_an_error_that_names_the_place(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path)
    message = f"^Could not write {re.escape(str(tmp_path))}{reason}"
    with limited(resource.RLIMIT_FSIZE, 4096), pytest.raises(ClipcidError, match=message):
        make(tmp_path)
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_what_is_written_never_reaches_a_file_beyond_a_link(tmp_path: Path, link: Any) -> None:
    victim, log = tmp_path / "victim", tmp_path / "log"
    victim.write_text("mine")
    for name in (".file.partial", "file", "array"):
        link(tmp_path / name, victim)
    log.symlink_to(victim)
    write_text(tmp_path / "file", "new")
    create_mapped(tmp_path / "array", INT64, (2, 2))[:] = 7
    with pytest.raises(ClipcidError, match="log: it is a link, which is not followed"):
        append_lines(log, [{"step": 1}])
    assert victim.read_text() == "mine"
    assert (tmp_path / "file").read_text() == "new"


def write_shared(path: Path, content: bytes, is_begun: Any = None, may_end: Any = None) -> None:
    with atomic_file(path, shared=True) as file:
        file.write(content)
        if is_begun is not None:
            is_begun.set()
            may_end.wait(30)


def test_of_two_that_write_one_file_at_once_one_waits_and_what_killed_ones_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.partial").write_bytes(b"left by one that was killed, and longer")
    context = process_context()
    is_begun, may_end = context.Event(), context.Event()
    first = context.Process(target=write_shared, args=(path, b"first", is_begun, may_end))
    first.start()
    assert is_begun.wait(30)
    second = context.Process(target=write_shared, args=(path, b"second"))
    second.start()
    second.join(0.5)
    assert second.is_alive()
    may_end.set()
    for process in (first, second):
        process.join(30)
        assert process.exitcode == 0
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["file"]


def test_many_that_write_one_file_at_once_all_succeed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: write_text(tmp_path / "file", str(number), shared=True), range(1500)))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("has_fallocate", [True, False])
def test_mapped_arrays_are_zeros_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_fallocate: bool
) -> None:
    """Also on systems that cannot reserve space, as macOS."""
    if not has_fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    named, unnamed = (
        create_mapped(tmp_path / "array", INT64, (3, 2)),
        create_mapped(tmp_path, INT64, (3, 2), unnamed=True),
    )
    for array in (named, unnamed):
        assert (array.shape, array.dtype) == ((3, 2), INT64)
        assert not array.any()
        array[:] = 7
        assert array.sum() == 42
    assert [path.name for path in tmp_path.iterdir()] == ["array"]
    assert np.fromfile(tmp_path / "array", INT64).tolist() == [7] * 6
    assert create_mapped(tmp_path, INT64, (0, 2), unnamed=True).shape == (0, 2)
