"""The folder of copies: fetched once, limited, never taken away from who reads them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shard_server import ShardServer, serve

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.remote import describe_file
from clipcid_cli.formats.data.samples import ByteRange, close_copies
from clipcid_cli.formats.data.shard_cache import ShardCache, ShardCopy, fetch_ahead
from clipcid_cli.formats.fingerprint import FileRecord

SIZE = 1000


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(8):
        path = tmp_path / "data" / f"{number}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * SIZE)
    return tmp_path / "data"


def copies_of(server: ShardServer, cache: ShardCache) -> list[ShardCopy]:
    return [copy_of(cache, f"{server.url}/{number}.tar") for number in range(8)]


def copy_of(cache: ShardCache, path: str) -> ShardCopy:
    shard = describe_file(path)
    return ShardCopy(cache, shard, f"{zlib.crc32(repr(shard).encode()):x}")


def bytes_in(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def read(copy: ShardCopy) -> bytes:
    descriptor = copy.open()
    try:
        return os.pread(descriptor, 2 * SIZE, 0)
    finally:
        os.close(descriptor)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_least_recently_opened_copies_make_room(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    with serve(data, drop_every=5) as server:
        copies = copies_of(server, cache)
        for number in (0, 1, 2, 0, 3, 0, 4):
            assert read(copies[number]) == bytes([number]) * SIZE
            assert bytes_in(cache) <= cache.max_bytes
            time.sleep(0.01)  # so that times of files differ
        assert [copy.local.exists() for copy in copies] == [True, False, False, True, True, False, False, False]
        assert server.requests["0.tar"] == 1


def test_another_version_is_another_copy_and_never_taken_for_the_one_listed(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    with serve(data) as server:
        listed = copy_of(cache, f"{server.url}/0.tar")
        (data / "0.tar").write_bytes(b"x" * SIZE)
        os.utime(data / "0.tar", (1, 1))  # the ETag
        with pytest.raises(ClipcidError, match=r"0\.tar has changed since it was listed"):
            listed.open()
        assert [path.name for path in cache.folder.iterdir()] == []
        assert read(copy_of(cache, listed.shard.path)) == b"x" * SIZE
        assert not listed.local.exists()


def test_a_copy_in_use_stays(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    with serve(data) as server:
        copies = copies_of(server, cache)
        first, second = copies[0].open(), copies[1].open()
        with pytest.raises(
            ClipcidError, match=r"may take 2,000 bytes: copies in use have 2,000, and the next has 1,000"
        ):
            copies[2].open()
        os.close(second)
        assert read(copies[2]) == bytes([2]) * SIZE
        assert copies[0].local.exists()
        assert not copies[1].local.exists()
        assert os.pread(first, SIZE, 0) == bytes(SIZE)
        os.close(first)
        assert bytes_in(cache) == 2 * SIZE


def test_processes_and_threads_fetch_a_copy_once(data: Path, tmp_path: Path) -> None:
    script = """
import sys
import zlib
from pathlib import Path
from clipcid_cli.formats.data.remote import describe_file
from clipcid_cli.formats.data.shard_cache import ShardCache, ShardCopy
cache = ShardCache(Path(sys.argv[2]), 10**6)
for number in range(8):
    path = f"{sys.argv[1]}/{number}.tar"
    shard = describe_file(path)
    ShardCopy(cache, shard, f"{zlib.crc32(repr(shard).encode()):x}").open()
"""
    cache = ShardCache(tmp_path / "cache", 10**6)
    with serve(data, delay=0.02) as server:
        command = [sys.executable, "-c", script, server.url, str(cache.folder)]
        with subprocess.Popen(command) as one, subprocess.Popen(command) as other, ThreadPoolExecutor(4) as pool:
            assert list(pool.map(read, copies_of(server, cache))) == [bytes([number]) * SIZE for number in range(8)]
        assert one.returncode == other.returncode == 0
        assert list(server.requests.values()) == [1] * 8
        assert sorted(path.name for path in cache.folder.iterdir()) == sorted(
            [".lock", *(copy.local.name for copy in copies_of(server, cache))]
        )


def test_fetching_ahead_takes_no_more_than_the_limit(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 5 * SIZE)
    with serve(data) as server:
        copies = copies_of(server, cache)
        held = copies[7].open()
        fetch_ahead(copies)
        wait_until(lambda: server.requests.total() >= 8)
        wait_until(lambda: copies[6].local.exists() and not list(cache.folder.glob(".*.partial")))
        assert bytes_in(cache) <= 5 * SIZE
        assert copies[7].local.exists()
        os.close(held)


def test_what_a_killed_process_left_is_fetched_again(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    with serve(data) as server:
        copies = copies_of(server, cache)
        cache.folder.mkdir()
        for copy in copies[:3]:
            copy.local.with_name(f".{copy.local.name}.partial").write_bytes(b"x" * SIZE)
        assert read(copies[0]) == bytes(SIZE)
        assert read(copies[4]) == bytes([4]) * SIZE
        assert bytes_in(cache) <= 3 * SIZE
        with pytest.raises(ClipcidError, match=r"9\.tar could not be fetched"):
            ShardCopy(cache, FileRecord(f"{server.url}/9.tar", 0, ""), "1").open()
        assert len(list(cache.folder.iterdir())) <= 4  # .lock and three copies or parts


def test_commands_are_copied_too(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 100)
    copy = copy_of(cache, "pipe:printf 0123456789")
    assert ByteRange(copy.shard.path, 3, 4, copy=copy).read() == b"3456"
    assert copy.local.read_bytes() == b"0123456789"
    with pytest.raises(ClipcidError, match="may take 5 bytes: copies in use have 0, and the next has 10"):
        copy_of(ShardCache(tmp_path / "other", 5), copy.shard.path).open()


def test_copies_that_a_process_has_read_from_make_room_once_it_closes_them(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10)
    one, other = (copy_of(cache, f"pipe:printf {text}") for text in ("0123456789", "abcdefghij"))
    assert ByteRange(one.shard.path, 3, 4, copy=one).read() == b"3456"
    with pytest.raises(ClipcidError, match="copies in use have 10, and the next has"):
        ByteRange(other.shard.path, 3, 4, copy=other).read()
    close_copies()
    assert ByteRange(other.shard.path, 3, 4, copy=other).read() == b"defg"
    close_copies()


def test_a_reader_waits_for_no_reader(tmp_path: Path) -> None:
    copy = copy_of(ShardCache(tmp_path, 100), "pipe:printf 0123456789")
    descriptors = [copy.open() for _ in range(3)]
    with copy.local.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for descriptor in descriptors:
        os.close(descriptor)


def test_who_waits_for_a_fetch_does_not_wait_for_the_readers_of_its_copy(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 8 * SIZE)
    cache.folder.mkdir()
    with serve(data) as server, ThreadPoolExecutor(1) as pool:
        copy = copies_of(server, cache)[0]
        partial = copy.local.with_name(f".{copy.local.name}.partial")
        with partial.open("wb") as file:
            # The lock of a reader who was quicker when the fetch ended: it lasts.
            fcntl.flock(file, fcntl.LOCK_SH)
            waiting = pool.submit(copy.fetch)
            time.sleep(0.1)  # it has opened the file that will be the copy
            file.write(bytes(SIZE))
            partial.replace(copy.local)
            waiting.result(timeout=20)
