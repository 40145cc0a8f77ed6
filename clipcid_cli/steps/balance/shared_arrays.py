"""Large arrays that all processes of a run read: in memory where there is one process, else in files that all of them map.

A gathered or broadcast array takes memory in every process, several times while it is sent. A mapped file takes the memory
of the host once, and only as long as the system has no other use for it. Processes on several hosts share the folder.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.files import write_error, write_npy
from clipcid_cli.runtime.distributed import DistContext

_FOLDER = ".shared"


class SharedArrays:
    """How the processes of a run share arrays, by a folder that all of them reach: all of them call the same methods."""

    def __init__(self, context: DistContext, work: Path) -> None:
        """Agree on names; the folder of unfinished work holds the files."""
        self.context = context
        self.work = work
        # New ones in every run: under a name used before, another host may still see the earlier content (NFS).
        self._name = context.broadcast(secrets.token_hex(4))
        self._number = count()

    def publish(self, make: Callable[[], Arrays]) -> Arrays:
        """Make arrays on the first process and return them, read-only, on every process.

        Where all processes are on one host, the files are gone when this returns: the maps keep their content. Another host
        reads what it has mapped from the disk whenever it needs it, so there they stay until `remove_shared`.
        """
        context = self.context
        if context.size == 1:
            return make()
        place = self._next_place()
        length = context.on_rank0(lambda: _write(place, 0, make()))
        arrays = context.on_all(lambda: _map(place, 0, length))
        if context.is_main and not context.spans_hosts:
            shutil.rmtree(place, ignore_errors=True)
        return arrays

    def collect(self, make: Callable[[], Arrays]) -> list[Arrays]:
        """Make arrays on every process, and return all of them, by rank, on the first one; nothing on the others."""
        context = self.context
        if context.size == 1:
            return [make()]
        place = self._next_place()
        length = context.on_all(lambda: _write(place, context.rank, make()))
        collected: list[Arrays] = []

        def read() -> None:
            collected.extend(_map(place, rank, length) for rank in range(context.size))
            shutil.rmtree(place, ignore_errors=True)  # by the host that has mapped them: NFS keeps their content for it

        context.on_rank0(read)
        return collected

    def reduce(self, result: Callable[[], Arrays], add: Callable[[Arrays], None]) -> Arrays:
        """Join in pairs what processes have, round by round: half of them add what others have to their own.

        Args:
            result: Returns what this process has, as arrays.
            add: Adds what another process has.

        Returns:
            What the first process has in the end, read-only, on every process.
        """
        step = 1
        while step < self.context.size:
            self._join_pairs(step, result, add)
            step *= 2
        return self.publish(result)

    def _join_pairs(self, step: int, result: Callable[[], Arrays], add: Callable[[Arrays], None]) -> None:
        """Let every second of the processes 0, step, 2 · step, … give what it has to the one before it."""
        context = self.context
        place = self._next_place()
        gives = context.rank % (2 * step) == step
        lengths = context.gather(context.on_all(lambda: _write(place, context.rank, result() if gives else ())))
        giver = context.rank + step
        if context.rank % (2 * step) == 0 and giver < context.size:
            add(_map(place, giver, lengths[giver]))
        context.barrier()
        if context.is_main:
            shutil.rmtree(place, ignore_errors=True)

    def _next_place(self) -> Path:
        """Return the folder of the next exchange, the same on every process."""
        return self.work / _FOLDER / f"{self._name}-{next(self._number)}"


def remove_shared(work: Path) -> None:
    """Remove the files of all arrays: of this run, when no process reads them any more, or of one that was killed."""
    shutil.rmtree(work / _FOLDER, ignore_errors=True)


def _write(place: Path, rank: int, arrays: Arrays) -> int:
    """Write the arrays of a process; return how many they are."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(place, error) from error
    for number, array in enumerate(arrays):
        write_npy(place / f"{rank}-{number}.npy", array)
    return len(arrays)


def _map(place: Path, rank: int, length: int) -> Arrays:
    paths = [place / f"{rank}-{number}.npy" for number in range(length)]
    try:
        # Of this run's processes; without objects nothing of a file in their place would run.
        arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    except FileNotFoundError as error:
        raise ClipcidError(
            f"{error.filename} was written by another process of the run, but not every host has it.",
            "Use a --work that all hosts share.",
        ) from error
    return tuple(array.view(np.ndarray) if len(array) else np.empty(0, array.dtype) for array in arrays)
