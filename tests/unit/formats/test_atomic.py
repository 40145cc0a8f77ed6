"""Files appear whole or not at all."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file, held_folder, remove_abandoned, write_json, write_npy, write_text
from clipcid_cli.formats.output import open_output
from clipcid_cli.formats.sidecar import Sidecar


def test_the_old_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ClipcidError, match=r"Could not write .*file\.bin: No space left") as caught,
        atomic_file(tmp_path / "file.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "space" in caught.value.fix
    assert os.listdir(tmp_path) == []


def test_a_real_full_device_is_one_clear_error(tmp_path: Path) -> None:
    # A file-size limit fails the write inside the kernel, as a full disk does.
    program = f"""
import resource, signal
from pathlib import Path
import numpy as np
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.errors import ClipcidError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_npy(Path({str(tmp_path)!r}) / "big.npy", np.zeros(100000))
except ClipcidError as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Could not write" in done.stdout
    assert "big.npy" in done.stdout
    assert os.listdir(tmp_path) == []


def test_an_error_about_another_file_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file"):
        (tmp_path / "missing").read_bytes()


def test_a_link_to_a_missing_file_in_the_place_of_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / ".embed.lock").symlink_to(tmp_path / "nowhere" / "lock")
    with pytest.raises(ClipcidError, match=r"Could not write .*\.embed\.lock") as caught:  # noqa: SIM117  # it is not opened
        with open_output(tmp_path, "embed", Sidecar, settings={}, inputs=[], overwrite=False):
            pass
    assert "link to a missing file" in caught.value.fix


@pytest.mark.parametrize("age", [-366 * 86400, 0, 366 * 86400])
def test_what_nobody_holds_is_removed_whatever_its_time(tmp_path: Path, age: int) -> None:
    left = (tmp_path / ".file.0.partial", tmp_path / "join-killed", tmp_path / "join-killed-before-it-was-held")
    write_text(left[0], "half")
    write_text(left[1] / ".lock", "")
    left[2].mkdir()
    with atomic_file(tmp_path / "file", shared=True) as file, held_folder("join-", tmp_path) as folder:
        for path in tmp_path.iterdir():
            os.utime(path, (time.time() - age,) * 2)
        remove_abandoned(tmp_path.iterdir())
        assert sorted(tmp_path.iterdir()) == sorted((Path(file.name), folder))
        file.write(b"whole")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_two_that_write_one_file_at_once_leave_that_of_the_last(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file", shared=True) as late:
        late.write(b"late")
        with atomic_file(tmp_path / "file", shared=True) as early:
            early.write(b"early and longer")
        assert (tmp_path / "file").read_bytes() == b"early and longer"
    assert (tmp_path / "file").read_bytes() == b"late"


def test_what_is_removed_before_it_is_held_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, removed = fcntl.flock, list[Path]()

    def lock_late(file: int, operation: int) -> None:
        if len(removed) < 2:
            removed.append(Path(f"/proc/self/fd/{file}").readlink())
            remove_abandoned([removed[-1].parent if removed[-1].name == ".lock" else removed[-1]])
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with atomic_file(tmp_path / "file", shared=True) as file:
        file.write(b"whole")
    removed.clear()
    with held_folder("join-", tmp_path) as folder:
        assert (folder / ".lock").exists()
        assert folder != removed[0].parent
    assert os.listdir(tmp_path) == ["file"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_npy_holds_the_array_and_needs_no_pickle(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    write_npy(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), array)
    with pytest.raises(ValueError, match="Object arrays"):
        write_npy(tmp_path / "b.npy", np.array([{}], dtype=object))
