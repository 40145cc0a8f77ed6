"""The folder of copies: fetched once, limited, never taken away from who reads them."""

from __future__ import annotations

import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import process_context
from shard_server import ShardServer, serve

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.remote import describe_file
from clipcid_cli.formats.data.samples import ByteRange, close_copies
from clipcid_cli.formats.data.shard_cache import ShardCache, ShardCopy
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


def read_all(copies: list[ShardCopy]) -> None:
    for copy in copies:
        read(copy)


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
            ClipcidError, match=r"may hold 2,000 bytes: copies in use have 2,000, and the next has 1,000"
        ):
            copies[2].open()
        os.close(second)
        assert read(copies[2]) == bytes([2]) * SIZE
        assert copies[0].local.exists()
        assert not copies[1].local.exists()
        assert os.pread(first, SIZE, 0) == bytes(SIZE)
        os.close(first)
        assert bytes_in(cache) == 2 * SIZE


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


def test_processes_and_threads_fetch_a_copy_once(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**6)
    with serve(data, delay=0.02) as server, ThreadPoolExecutor(4) as pool:
        copies = copies_of(server, cache)
        context = process_context()
        others = [context.Process(target=read_all, args=(copies,)) for _ in range(2)]
        for other in others:
            other.start()
        assert list(pool.map(read, copies)) == [bytes([number]) * SIZE for number in range(8)]
        for other in others:
            other.join(60)
            assert other.exitcode == 0
        assert list(server.requests.values()) == [1] * 8
        assert {path.name for path in cache.folder.iterdir()} == {".lock", *(copy.local.name for copy in copies)}


def test_the_output_of_a_command_is_copied_and_makes_room_once_a_process_closes_what_it_read(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10)
    one, other = (copy_of(cache, f"pipe:printf {text}") for text in ("0123456789", "abcdefghij"))
    assert ByteRange(one.shard.path, 3, 4, copy=one).read() == b"3456"
    assert one.local.read_bytes() == b"0123456789"
    with pytest.raises(ClipcidError, match="may hold 10 bytes: copies in use have 10, and the next has 10"):
        ByteRange(other.shard.path, 3, 4, copy=other).read()
    close_copies()
    assert ByteRange(other.shard.path, 3, 4, copy=other).read() == b"defg"
    close_copies()
