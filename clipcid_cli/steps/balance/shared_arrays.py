"""Large arrays that all processes of a run read: in memory where there is one process, else in files that all of them map.

A gathered or broadcast array takes memory in every process, several times while it is sent. A mapped file takes the memory
of the host once, and only as long as the system has no other use for it. Processes on several hosts share the folder.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.files import write_error, write_npy
from clipcid_cli.runtime.distributed import DistContext

_FOLDER = ".shared"


@dataclasses.dataclass(frozen=True)
class SharedArrays:
    """How the processes of a run share arrays, by a folder that all of them reach."""

    context: DistContext
    work: Path  # the folder of unfinished work, in which that folder is

    @property
    def _folder(self) -> Path:
        return self.work / _FOLDER

    def publish(self, make: Callable[[], Arrays]) -> Arrays:
        """Make arrays on the first process and return them, read-only, on every process.

        Where all processes are on one host, the files are gone when this returns: the maps keep their content. Another host
        reads what it has mapped from the disk whenever it needs it, so there they stay until `remove_shared`.
        """
        context = self.context
        if context.size == 1:
            return make()

        def write() -> tuple[Path, int]:
            arrays = make()
            place = self._new_place()
            _write(place, 0, arrays)
            return place, len(arrays)

        place, number = context.on_rank0(write)
        found = context.on_all(lambda: _map(place, 0, number))
        if not context.spans_hosts:
            context.on_rank0(lambda: shutil.rmtree(place, ignore_errors=True))
        return found

    def collect(self, arrays: Arrays) -> list[Arrays]:
        """Return the arrays of every process, in order of rank, on the first one; nothing on the others."""
        context = self.context
        if context.size == 1:
            return [arrays]
        place = context.on_rank0(self._new_place)
        context.on_all(lambda: _write(place, context.rank, arrays))

        found: list[Arrays] = []

        def read() -> None:
            found.extend(_map(place, rank, len(arrays)) for rank in range(context.size))
            shutil.rmtree(place, ignore_errors=True)  # by the host that has mapped them: NFS keeps their content for it

        context.on_rank0(read)
        return found

    def reduce(self, result: Callable[[], Arrays], add: Callable[[Arrays], None]) -> Arrays:
        """Join in pairs what processes have, round by round: half of them add what others have to their own.

        Args:
            result: Returns what this process has, as arrays.
            add: Adds what another process has.

        Returns:
            What the first process has in the end, read-only, on every process.
        """
        context = self.context
        step = 1
        while step < context.size:
            place = context.on_rank0(self._new_place)
            arrays = result() if context.rank % (2 * step) == step else ()
            context.on_all(partial(_write, place, context.rank, arrays))
            counts = context.gather(len(arrays))
            other = context.rank + step
            if context.rank % (2 * step) == 0 and other < context.size:
                add(_map(place, other, counts[other]))
            context.barrier()
            context.on_rank0(partial(shutil.rmtree, place, ignore_errors=True))
            step *= 2
        return self.publish(result)

    def _new_place(self) -> Path:
        """Make a folder with a new name: under a name used before, another host may still see the earlier content (NFS)."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="", dir=self._folder))
        except OSError as error:
            raise write_error(self._folder, error) from error


def remove_shared(work: Path) -> None:
    """Remove the files of all arrays: of this run, when no process reads them any more, or of one that was killed."""
    shutil.rmtree(work / _FOLDER, ignore_errors=True)


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
