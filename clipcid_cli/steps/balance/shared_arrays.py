"""Large arrays that all processes of a run read: in memory where there is one process, else in files that all of them map.

A gathered or broadcast array takes memory in every process, several times while it is sent. A mapped file takes the memory
of the host once, and only as long as the system has no other use for it. Processes on several hosts share the folder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.atomic import write_error, write_npy
from clipcid_cli.runtime.distributed import DistContext

_FOLDER = ".shared"


def publish_arrays(context: DistContext, folder: Path, make: Callable[[], Arrays]) -> Arrays:
    """Make arrays on the first process and return them, read-only, on every process, by a folder that all reach.

    Where all processes are on one host, the files are gone when this returns: the maps keep their content. Another host
    reads what it has mapped from the disk whenever it needs it, so there they stay until `clear_shared`.
    """
    if context.size == 1:
        return make()

    def write() -> tuple[Path, int]:
        arrays = make()
        place = _new_folder(folder)
        _write(place, 0, arrays)
        return place, len(arrays)

    place, number = context.on_rank0(write)
    found = context.on_all(lambda: _map(place, 0, number))
    if not context.spans_hosts:
        context.on_rank0(lambda: shutil.rmtree(place, ignore_errors=True))
    return found


def collect_arrays(context: DistContext, folder: Path, arrays: Arrays) -> list[Arrays]:
    """Return the arrays of every process, in order of rank, on the first one; nothing on the others."""
    if context.size == 1:
        return [arrays]
    place = context.on_rank0(lambda: _new_folder(folder))
    context.on_all(lambda: _write(place, context.rank, arrays))

    found: list[Arrays] = []

    def read() -> None:
        found.extend(_map(place, rank, len(arrays)) for rank in range(context.size))
        shutil.rmtree(place, ignore_errors=True)  # by the host that has mapped them: NFS keeps their content for it

    context.on_rank0(read)
    return found


def reduce_arrays(
    context: DistContext, folder: Path, result: Callable[[], Arrays], add: Callable[[Arrays], None]
) -> Arrays:
    """Join in pairs what processes have, round by round: half of them add what others have to their own.

    Args:
        result: Returns what this process has, as arrays.
        add: Adds what another process has.

    Returns:
        What the first process has in the end, read-only, on every process.
    """
    step = 1
    while step < context.size:
        place = context.on_rank0(lambda: _new_folder(folder))
        counts = context.gather(context.on_all(partial(_give, context, place, step, result)))
        other = context.rank + step
        if context.rank % (2 * step) == 0 and other < context.size:
            add(_map(place, other, counts[other]))
        context.barrier()
        context.on_rank0(partial(shutil.rmtree, place, ignore_errors=True))
        step *= 2
    return publish_arrays(context, folder, result)


def _give(context: DistContext, place: Path, step: int, result: Callable[[], Arrays]) -> int:
    """Write what this process has where it is its turn; return the number of arrays."""
    if context.rank % (2 * step) != step:
        return 0
    arrays = result()
    _write(place, context.rank, arrays)
    return len(arrays)


def clear_shared(folder: Path) -> None:
    """Remove the files of all arrays: of this run, when no process reads them any more, or of one that was killed."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def _new_folder(folder: Path) -> Path:
    """Make a folder with a new name: under a name used before, another host may still see the earlier content (NFS)."""
    shared = folder / _FOLDER
    try:
        shared.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="", dir=shared))
    except OSError as error:
        raise write_error(shared, error) from error


def _write(place: Path, rank: int, arrays: Arrays) -> None:
    for number, array in enumerate(arrays):
        write_npy(place / f"{rank}-{number}.npy", array)


def _map(place: Path, rank: int, number: int) -> Arrays:
    paths = [place / f"{rank}-{each}.npy" for each in range(number)]
    try:
        found = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    except FileNotFoundError as error:
        raise ClipcidError(
            f"{error.filename} was written by another process of the run, but not every host has it.",
            "Use a --work that all hosts share.",
        ) from error
    return tuple(each.view(np.ndarray) if len(each) else np.empty(0, each.dtype) for each in found)
