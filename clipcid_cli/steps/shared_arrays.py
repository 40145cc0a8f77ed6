"""Large arrays that all processes of a run read: in memory where there is one process, else in files that all of them map.

A gathered or broadcast array takes memory in every process, several times while it is sent. A mapped file takes the memory
of the host once, and only as long as the system has no other use for it. Processes on several hosts share the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.runtime.machine import Machine

_FOLDER = ".shared"

Arrays = tuple[npt.NDArray[Any], ...]


def share_arrays(machine: Machine, folder: Path, make: Callable[[], Arrays]) -> Arrays:
    """Make arrays on the first process and return them, read-only, on every process.

    Args:
        folder: A folder that all processes reach; the files are gone when this returns.

    Raises:
        ClipcidError: what `make` raised, or that a file cannot be written.
    """
    if machine.size == 1:
        return make()

    def write() -> int:
        arrays = make()
        _write(folder, 0, arrays)
        return len(arrays)

    number = machine.on_main(write)
    found = machine.on_all(lambda: _map(folder, 0, number))
    machine.on_main(lambda: clear_shared(folder))
    return found


def collect_arrays(machine: Machine, folder: Path, arrays: Arrays) -> list[Arrays]:
    """Return the arrays of every process, in order of rank, on the first one; nothing on the others."""
    if machine.size == 1:
        return [arrays]
    machine.on_all(lambda: _write(folder, machine.rank, arrays))
    found: list[Arrays] = []
    machine.on_main(lambda: found.extend(_map(folder, rank, len(arrays)) for rank in range(machine.size)))
    machine.on_main(lambda: clear_shared(folder))  # nobody goes on, and writes again, before
    return found


def clear_shared(folder: Path) -> None:
    """Remove what a run that was killed has left."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def _write(folder: Path, rank: int, arrays: Arrays) -> None:
    for number, array in enumerate(arrays):
        write_npy(_path(folder, rank, number), array)


def _map(folder: Path, rank: int, number: int) -> Arrays:
    return tuple(_map_one(_path(folder, rank, each)) for each in range(number))


def _map_one(path: Path) -> npt.NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ClipcidError(
            f"{path} was written by another process of the run, but not every host has it.",
            "Use a --work that all hosts share.",
        ) from error
    return array.view(np.ndarray) if len(array) else np.empty(0, array.dtype)


def _path(folder: Path, rank: int, number: int) -> Path:
    return folder / _FOLDER / f"{rank}-{number}.npy"
