"""Streams and ranges of files behind URLs and of commands, with connections that break."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from shard_server import serve

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data import remote
from clipcid_cli.formats.data.dataset import open_dataset, open_described
from clipcid_cli.formats.data.remote import describe_file, open_remote, read_remote
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.data.shard import Shard


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
        list(Shard("0", f"pipe:cat {path}; exit 4").stream())
    for size, where in ((700, "within 000000.png"), (3000, r"within 00000\d\.\w+")):
        with pytest.raises(ClipcidError, match=f"is truncated: it ends {where}"):
            list(Shard("0", f"pipe:head -c {size} {path}").stream())
    with pytest.raises(ClipcidError, match="is damaged at byte 0: there is no tar header"):
        list(Shard("0", "pipe:seq 1000").stream())


def test_a_command_that_fails_once_is_run_again(tiny_shards: Path, tmp_path: Path) -> None:
    path, mark = shlex.quote(str(tiny_shards / "00000.tar")), shlex.quote(str(tmp_path / "mark"))
    command = f"pipe:if [ -e {mark} ]; then cat {path}; else touch {mark}; head -c 4000 {path}; exit 1; fi"
    assert contents(list(Shard("0", command).stream())) == contents(
        Shard("0", str(tiny_shards / "00000.tar")).samples()
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


def test_fingerprints_of_urls_follow_what_the_server_says(tiny_shards: Path, tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes((tiny_shards / "00000.tar").read_bytes())
    with serve(tmp_path) as server:
        first = describe_file(f"{server.url}/0.tar")
        assert first.size == (tmp_path / "0.tar").stat().st_size
        assert describe_file(f"{server.url}/0.tar") == first
        assert describe_file(f"{server.url}/1.tar").hash != first.hash  # its ETag differs
        assert not server.bytes_sent
