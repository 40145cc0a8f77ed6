"""Large arrays that all processes of a run read: in memory where there is one process, else in files that all of them map.

A gathered or broadcast array takes memory in every process, several times while it is sent. A mapped file takes the memory
of the host once, and only as long as the system has no other use for it. Processes on several hosts share the folder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.atomic import write_error, write_npy
from clipcid_cli.runtime.machine import Machine

_FOLDER = ".shared"


def share_arrays(machine: Machine, folder: Path, make: Callable[[], Arrays]) -> Arrays:
    """Make arrays on the first process and return them, read-only, on every process.

    Where all processes are on one host, the files are gone when this returns: the maps keep their content. Another host
    reads what it has mapped from the disk whenever it needs it, so there they stay until `clear_shared`.

    Args:
        folder: A folder that all processes reach.
    """
    if machine.size == 1:
        return make()

    def write() -> tuple[str, int]:
        arrays = make()
        name = _new_folder(folder)
        _write(folder / _FOLDER / name, 0, arrays)
        return name, len(arrays)

    name, number = machine.on_main(write)
    found = machine.on_all(lambda: _map(folder / _FOLDER / name, 0, number))
    if not machine.spans_hosts:
        machine.on_main(lambda: _remove(folder / _FOLDER / name))
    return found


def collect_arrays(machine: Machine, folder: Path, arrays: Arrays) -> list[Arrays]:
    """Return the arrays of every process, in order of rank, on the first one; nothing on the others."""
    if machine.size == 1:
        return [arrays]
    place = folder / _FOLDER / machine.on_main(lambda: _new_folder(folder))
    machine.on_all(lambda: _write(place, machine.rank, arrays))
    found: list[Arrays] = []
    machine.on_main(lambda: found.extend(_map(place, rank, len(arrays)) for rank in range(machine.size)))
    machine.on_main(lambda: _remove(place))  # by the host that has mapped them: NFS keeps their content for it
    return found


def clear_shared(folder: Path) -> None:
    """Remove the files of all arrays: of this run, when no process reads them any more, or of one that was killed."""
    _remove(folder / _FOLDER)


def _new_folder(folder: Path) -> str:
    """Make a folder with a new name: under a name used before, another host may still see the earlier content (NFS)."""
    shared = folder / _FOLDER
    try:
        shared.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="", dir=shared)).name
    except OSError as error:
        raise write_error(shared, error) from error


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)


def _write(place: Path, rank: int, arrays: Arrays) -> None:
    for number, array in enumerate(arrays):
        write_npy(_path(place, rank, number), array)


def _map(place: Path, rank: int, number: int) -> Arrays:
    return tuple(_map_one(_path(place, rank, each)) for each in range(number))


def _map_one(path: Path) -> npt.NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ClipcidError(
            f"{path} was written by another process of the run, but not every host has it.",
            "Use a --work that all hosts share.",
        ) from error
    return array.view(np.ndarray) if len(array) else np.empty(0, array.dtype)


def _path(place: Path, rank: int, number: int) -> Path:
    return place / f"{rank}-{number}.npy"
