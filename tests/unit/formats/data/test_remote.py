"""Files behind URLs and of commands, with connections that break, and the folder of their copies."""

from __future__ import annotations

import os
import shlex
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest
from conftest import process_context, shard_members, write_tar
from shard_server import ShardServer, send, serve, serve_answers

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data import remote
from clipcid_cli.formats.data.activity import count_received
from clipcid_cli.formats.data.dataset import open_dataset, open_described
from clipcid_cli.formats.data.distant import close_copies
from clipcid_cli.formats.data.remote import describe_file, open_remote, read_remote
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.data.shard_cache import ShardCache, ShardCopy
from clipcid_cli.formats.data.tar_shards import TarShard
from clipcid_cli.formats.files import lock
from clipcid_cli.formats.fingerprint import FileRecord


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))


def contents(samples: list[Sample]) -> list[tuple[object, ...]]:
    return [(s.key, s.captions, s.label, s.image.offset, s.image.size, s.image.read()) for s in samples]


@pytest.mark.parametrize("sends_ranges", [True, False])
def test_a_stream_survives_broken_connections(
    sends_ranges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_REQUEST", 5000)
    data = bytes(range(256)) * 200
    (tmp_path / "a.bin").write_bytes(data)
    with serve(tmp_path, drop_every=3, sends_ranges=sends_ranges) as server:
        for _ in range(1 if sends_ranges else 3):
            with open_remote(f"{server.url}/a.bin") as stream:
                assert stream.read(1000) + stream.read(2000) + stream.read() == data
        assert server.dropped > 0
        assert server.bytes_sent["a.bin"] < 5 * len(data)


def test_what_stays_broken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.02))
    (tmp_path / "a.bin").write_bytes(bytes(10_000))
    with serve(tmp_path, drop_every=1) as server:
        with pytest.raises(ClipcidError, match=r"/a\.bin could not be fetched \(tried 3 times\)"):
            open_remote(f"{server.url}/a.bin").read(1)
        assert server.requests["a.bin"] == 3
        with pytest.raises(ClipcidError, match=r"/b\.bin could not be fetched: ") as raised:
            open_remote(f"{server.url}/b.bin").read(1)
    assert raised.value.fix
    with pytest.raises(ClipcidError, match=r"could not be fetched \(tried 3 times\)"):
        describe_file(f"{server.url}/a.bin")
    with pytest.raises(ClipcidError, match="nosuch://x cannot be opened"):
        describe_file("nosuch://x")


def test_an_overloaded_server_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(remote._WAITS + remote._LATER_WAITS) > 300
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01))
    monkeypatch.setattr(remote, "_LATER_WAITS", (0.01,) * 30)
    (tmp_path / "a.bin").write_bytes(bytes(range(200)))
    with serve(tmp_path) as server:
        server.overloaded = 20  # of a HEAD and a GET each
        with pytest.raises(OSError, match=r"could not be fetched \(tried 3 times\)"):
            ByteRange(f"{server.url}/a.bin").read()  # one image of a list
        server.overloaded = 20
        assert open_remote(f"{server.url}/a.bin").read() == bytes(range(200))
        server.drop_every = 1
        with pytest.raises(ClipcidError, match=r"could not be fetched \(tried 33 times\)"):  # it has answered
            read_remote(f"{server.url}/a.bin", 20, 30)


@pytest.mark.parametrize("sends_ranges", [True, False])
def test_ranges(sends_ranges: bool, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(range(200)))
    with serve(tmp_path, sends_ranges=sends_ranges) as server:
        assert read_remote(f"{server.url}/a.bin", 20, 30) == bytes(range(20, 50))
        assert ByteRange(f"{server.url}/a.bin").read() == bytes(range(200))
        with pytest.raises(OSError, match="ends 20 bytes early"):
            read_remote(f"{server.url}/a.bin", 190, 30)
        with pytest.raises(OSError, match="could not be fetched"):
            ByteRange(f"{server.url}/absent.jpg").read()


def test_recorded_commands_are_not_run(tiny_shards: Path) -> None:
    command = f"pipe:cat {shlex.quote(str(tiny_shards))}/{{00000..00001}}.tar"
    piped = open_dataset(command)
    assert piped.estimate_samples() == 20_000
    assert piped.fingerprints() != open_dataset(command.replace("cat", "cat -u")).fingerprints()
    with pytest.raises(ClipcidError, match="not run unless you give it"):
        open_described(piped.describe())


def test_commands_that_fail_are_named(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAITS", (0.01,))
    path = shlex.quote(str(tiny_shards / "00000.tar"))
    with pytest.raises(ClipcidError, match=r"The command pipe:exit 3 failed \(tried 2 times\): exit 3"):
        open_dataset("pipe:exit 3")
    with pytest.raises(ClipcidError, match=r"failed \(tried 2 times\): exit 4"):
        list(TarShard("0", f"pipe:cat {path}; exit 4").stream())
    for size, where in ((700, "within 000000.png"), (3000, r"within 00000\d\.\w+")):
        with pytest.raises(ClipcidError, match=f"is truncated: it ends {where}"):
            list(TarShard("0", f"pipe:head -c {size} {path}").stream())
    with pytest.raises(ClipcidError, match="is damaged at byte 0: there is no tar header"):
        list(TarShard("0", "pipe:seq 1000").stream())


def test_a_command_that_fails_once_is_run_again(tiny_shards: Path, tmp_path: Path) -> None:
    path, mark = shlex.quote(str(tiny_shards / "00000.tar")), shlex.quote(str(tmp_path / "mark"))
    command = f"pipe:if [ -e {mark} ]; then cat {path}; else touch {mark}; head -c 4000 {path}; exit 1; fi"
    assert contents(list(TarShard("0", command).stream())) == contents(
        TarShard("0", str(tiny_shards / "00000.tar")).samples()
    )


def test_commands_of_lists_and_other_files_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "list.csv"
    path.write_text(f'filepath,title\n"pipe:touch {mark}; echo x://y",text\n')
    (sample,) = open_dataset(path).shards[0].samples()
    with pytest.raises(OSError, match="No such file"):
        sample.image.read()
    with pytest.raises(OSError, match="has passed"):
        ByteRange(f"pipe:touch {mark}").read()
    assert not mark.exists()


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
    return sum(path.stat().st_size for path in copies_in(cache))


def copies_in(cache: ShardCache) -> list[Path]:
    """List copies and what is being fetched, and see that nothing is recorded of other ones."""
    files = [path for path in cache.folder.iterdir() if path.name != ".lock"]
    copies = [path for path in files if path.suffix != ".json"]
    assert {path.stem for path in files if path not in copies} <= {path.name for path in copies}
    return copies


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


def test_a_shard_behind_a_signed_address_is_copied(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    with serve(data) as server:
        address = f"{server.url}/1.tar?X-Amz-Signature=secret"
        described = msgspec.structs.replace(describe_file(address), path=address)  # as an index names it
        assert read(ShardCopy(cache, described, "1")) == b"\1" * SIZE


def test_a_shard_that_changes_while_it_is_fetched_is_no_copy(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    asked = list[str]()

    def answer(request: BaseHTTPRequestHandler) -> None:
        """Say another version after the content was sent, as a server does on which the file was replaced."""
        asked.append(request.command)
        content = (data / "0.tar").read_bytes()
        send(request, 200, content, Last_Modified=f"version {asked.count('GET')}" if request.command == "HEAD" else "")

    with serve_answers(answer) as url:
        with pytest.raises(ClipcidError, match=r"0\.tar has changed since it was listed"):
            copy_of(cache, f"{url}/0.tar").open()
        assert asked.count("GET") == 1
        assert copies_in(cache) == []


@pytest.mark.parametrize("damage", [b"7 bytes", b"x" * SIZE, b""])
def test_a_copy_that_is_not_what_was_fetched_is_fetched_again(damage: bytes, data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    with serve(data) as server:
        copy = copy_of(cache, f"{server.url}/1.tar")
        assert read(copy) == read(copy) == b"\1" * SIZE
        copy.local.write_bytes(damage)
        assert read(copy) == b"\1" * SIZE
        assert server.requests["1.tar"] == 2
        copy.local.with_name(copy.local.name + ".json").unlink()  # as of a version without them
        assert read(copy) == b"\1" * SIZE
        assert server.requests["1.tar"] == 3


def test_a_copy_is_compared_with_what_was_fetched_and_left_as_it_is(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    with serve(data) as server:
        copy = copy_of(cache, f"{server.url}/1.tar")
        assert copy.find_problem() is None, "there is none"
        read(copy)
    record = copy.local.with_name(f"{copy.local.name}.json")
    assert copy.find_problem() is None
    copy.local.write_bytes(b"7 bytes")
    assert copy.find_problem() == "has 7 bytes; 1,000 were fetched"
    copy.local.write_bytes(b"x" * SIZE)
    assert str(copy.find_problem()).startswith("has other content than was fetched: ")
    record.write_text("{}")
    assert str(copy.find_problem()).startswith("cannot be compared with what was fetched: ")
    record.unlink()
    assert copy.find_problem() == "has no record of what was fetched"
    assert copy.local.read_bytes() == b"x" * SIZE


def test_a_copy_is_read_whole_when_a_user_first_opens_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)

    def count_reads() -> int:
        before = count_received()
        assert read(copy) == b"\1" * SIZE
        return count_received() - before

    with serve(data) as server:
        copy = copy_of(cache, f"{server.url}/1.tar")
        assert count_reads() > 0
        assert count_reads() == 0
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user's"))
        assert count_reads() > 0
        assert count_reads() == 0
        assert server.requests["1.tar"] == 1


def test_whoever_waits_for_a_copy_that_grows_has_not_stalled(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    cache.folder.mkdir()
    with serve(data) as server, ThreadPoolExecutor(1) as pool:
        copy = copy_of(cache, f"{server.url}/1.tar")
        partial = copy.local.with_name(f".{copy.local.name}.partial")
        with lock(partial):  # as by another process that fetches it
            opened = pool.submit(read, copy)
            for number in range(1, 4):
                time.sleep(0.02)  # so that times of files differ
                before, end = count_received(), time.monotonic() + 10
                partial.write_bytes(bytes(number))
                while count_received() == before:
                    assert time.monotonic() < end
        assert opened.result() == b"\1" * SIZE


def test_what_has_no_known_size_is_not_copied_beyond_the_limit(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**6)
    with pytest.raises(ClipcidError, match=r"is limited to 1,000,000 bytes: pipe:yes is larger"):
        copy_of(cache, "pipe:yes").open()
    assert copies_in(cache) == []


def test_a_copy_in_use_stays(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    with serve(data) as server:
        copies = copies_of(server, cache)
        first, second = copies[0].open(), copies[1].open()
        with pytest.raises(
            ClipcidError, match=r"is limited to 2,000 bytes: copies in use take 2,000, and the next takes 1,000"
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
        assert len(copies_in(cache)) <= 3  # or parts


def test_processes_and_threads_fetch_a_copy_once(data: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**6)
    with serve(data, delay=0.02) as server, ThreadPoolExecutor(4) as pool:
        copies = copies_of(server, cache)
        other = process_context().Process(target=read_all, args=(copies,))
        other.start()
        assert list(pool.map(read, copies)) == [bytes([number]) * SIZE for number in range(8)]
        other.join(60)
        assert other.exitcode == 0
        assert list(server.requests.values()) == [1] * 8
        assert sorted(copies_in(cache)) == sorted(copy.local for copy in copies)


def test_the_output_of_a_command_is_copied_and_makes_room_once_a_process_closes_what_it_read(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10)
    one, other = (copy_of(cache, f"pipe:printf {text}") for text in ("0123456789", "abcdefghij"))
    assert ByteRange(one.shard.path, 3, 4, copy=one).read() == b"3456"
    assert one.local.read_bytes() == b"0123456789"
    with pytest.raises(ClipcidError, match="is limited to 10 bytes: copies in use take 10, and the next takes 10"):
        ByteRange(other.shard.path, 3, 4, copy=other).read()
    close_copies()
    assert ByteRange(other.shard.path, 3, 4, copy=other).read() == b"defg"
    close_copies()


def test_the_name_of_data_holds_no_secret_and_lists_and_shards_are_told_by_their_path(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", shard_members(0, 2))
    (tmp_path / "0.csv").write_text("filepath,title\n0.png,a\n")
    with serve(tmp_path) as server:
        login = server.url.replace("//", "//ann:hunter2@")
        for name, kind in (("0.tar", "webdataset"), ("{0..0}.tar", "webdataset"), ("0.csv", "list")):
            data = open_dataset(f"{login}/{name}?sig=secret&part=1")
            redacted = f"{server.url.replace('//', '//REDACTED@')}/{name}?sig=REDACTED&part=1"
            assert (data.kind, data.spec, data.describe().spec) == (kind, redacted, redacted)
            assert "secret" not in str(data.fingerprints())
            assert [shard.name for shard in data.shards] == (["0"] if kind == "webdataset" else ["00000"])
            (sample, *_) = data.shards[0].samples()
            assert sample.image.path.startswith(login)
    with pytest.raises(ClipcidError, match="an address whose secrets are not recorded"):
        open_described(data.describe())
