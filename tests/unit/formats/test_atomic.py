"""Files appear whole or not at all."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file, write_json, write_npy, write_text
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
    assert done.stdout.startswith("Could not write ")
    assert done.stdout.endswith("big.npy: the disk is full, or a limit of file sizes is reached.\n")
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


def write_shared(path: Path, content: bytes, is_begun: Any = None, may_end: Any = None) -> None:
    with atomic_file(path, shared=True) as file:
        file.write(content)
        if is_begun is not None:
            is_begun.set()
            may_end.wait(30)


def test_of_two_that_write_one_file_at_once_one_waits_and_what_killed_ones_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.partial").write_bytes(b"left by one that was killed, and longer")
    context = multiprocessing.get_context("spawn")
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
