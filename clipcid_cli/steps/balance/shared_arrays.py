"""Large arrays that all processes of a run read: in memory where there is one process, else in files that all of them map.

A gathered or broadcast array takes memory in every process, several times while it is sent. A mapped file takes the memory
of the host once, and only as long as the system has no other use for it. Processes on several hosts share the folder.
"""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal, ParamSpec

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays, create_mapped
from clipcid_cli.formats.files import write_error
from clipcid_cli.runtime.distributed import DistContext

_FOLDER = ".shared"

P = ParamSpec("P")

_Form = tuple[np.dtype[Any], tuple[int, ...]]


class SharedArrays:
    """How the processes of a run share arrays, by a folder that all of them reach: all of them call the same methods."""

    def __init__(self, context: DistContext, work: Path) -> None:
        """Agree on names; the folder of unfinished work holds the files."""
        self.context = context
        self.work = work
        # New ones in every run: under a name used before, another host may still see the earlier content (NFS).
        self._name = context.broadcast(secrets.token_hex(4))
        self._number = count()

    def publish(self, make: Callable[P, Arrays], *args: P.args, **kwargs: P.kwargs) -> Arrays:
        """Make arrays on the first process and return them, read-only, on every process.

        Where all processes are on one host, the files are gone when this returns: the maps keep their content. Another host
        reads what it has mapped from the disk whenever it needs it, so there they stay until `remove_shared`.
        """
        context = self.context
        if context.size == 1:
            return make(*args, **kwargs)
        place = self._next_place()
        forms = context.on_rank0(lambda: self._write(place, 0, make(*args, **kwargs)))
        arrays = context.on_all(_map, place, 0, forms)
        self._forget(place)
        return arrays

    def collect(self, make: Callable[P, Arrays], *args: P.args, **kwargs: P.kwargs) -> list[Arrays]:
        """Make arrays on every process, and return all of them, by rank, on the first one; nothing on the others."""
        context = self.context
        if context.size == 1:
            return [make(*args, **kwargs)]
        place = self._next_place()
        forms = context.gather(context.on_all(lambda: self._write(place, context.rank, make(*args, **kwargs))))
        collected: list[Arrays] = []

        def read() -> None:
            collected.extend(_map(place, rank, of_rank) for rank, of_rank in enumerate(forms))
            shutil.rmtree(place, ignore_errors=True)  # by the host that has mapped them: NFS keeps their content for it

        context.on_rank0(read)
        return collected

    def exchange(self, make: Callable[P, Arrays], *args: P.args, **kwargs: P.kwargs) -> list[Arrays]:
        """Make arrays on every process, and return all of them, by rank, read-only, on every process."""
        context = self.context
        if context.size == 1:
            return [make(*args, **kwargs)]
        place = self._next_place()
        forms = context.gather(context.on_all(lambda: self._write(place, context.rank, make(*args, **kwargs))))
        arrays = context.on_all(lambda: [_map(place, rank, of_rank) for rank, of_rank in enumerate(forms)])
        self._forget(place)
        return arrays

    def assemble(self, make: Callable[P, Arrays], *args: P.args, **kwargs: P.kwargs) -> Arrays:
        """Make a part of some arrays, [n], on every process; return the whole, the parts by rank, on every process."""
        context = self.context
        if context.size == 1:
            return make(*args, **kwargs)
        if context.spans_hosts:  # where parts meet in a page of a file, each host would write it with its part alone
            parts = self.collect(make, *args, **kwargs)
            return self.publish(lambda: tuple(self._concatenate(arrays) for arrays in zip(*parts, strict=True)))
        place = self._next_place()
        own = context.on_all(make, *args, **kwargs)
        lengths = np.array(context.gather([len(array) for array in own]))
        begins = lengths[: context.rank].sum(axis=0)
        forms = [(array.dtype, (int(length),)) for array, length in zip(own, lengths.sum(axis=0), strict=True)]

        def create() -> None:  # returns nothing: what a process of `on_rank0` returns is sent to all
            _create(place, 0, forms)

        context.on_rank0(create)

        def fill() -> None:
            for whole, part, begin in zip(_map(place, 0, forms, "r+"), own, begins.tolist(), strict=True):
                whole[begin : begin + len(part)] = part

        context.on_all(fill)
        arrays = context.on_all(_map, place, 0, forms)
        self._forget(place)
        return arrays

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
        forms = context.gather(context.on_all(lambda: self._write(place, context.rank, result() if gives else ())))
        giver = context.rank + step
        if context.rank % (2 * step) == 0 and giver < context.size:
            add(_map(place, giver, forms[giver]))
        context.barrier()
        if context.is_main:
            shutil.rmtree(place, ignore_errors=True)

    def _concatenate(self, parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Join the mapped parts of an array in a file: in memory keys of 400 million images would take 10 GB."""
        whole = create_mapped(self.work, parts[0].dtype, (sum(map(len, parts)),), unnamed=True)
        end = 0
        for part in parts:
            begin, end = end, end + len(part)
            whole[begin:end] = part
        return whole

    def _next_place(self) -> Path:
        """Return the folder of the next exchange, the same on every process."""
        return self.work / _FOLDER / f"{self._name}-{next(self._number)}"

    def _write(self, place: Path, rank: int, arrays: Arrays) -> list[_Form]:
        """Write the arrays of a process; return their forms."""
        forms = [(array.dtype, array.shape) for array in arrays]
        for file, array in zip(_create(place, rank, forms), arrays, strict=True):
            file[...] = array
            self._flush(file)
        return forms

    def _flush(self, array: npt.NDArray[Any]) -> None:
        """Let other hosts see what was written; no other process waits for the disk."""
        if self.context.spans_hosts and isinstance(array, np.memmap):
            array.flush()

    def _forget(self, place: Path) -> None:
        """Remove files that all processes have mapped, where none of these is on another host."""
        if self.context.is_main and not self.context.spans_hosts:
            shutil.rmtree(place, ignore_errors=True)


def remove_shared(work: Path) -> None:
    """Remove the files of all arrays: of this run, when no process reads them any more, or of one that was killed."""
    shutil.rmtree(work / _FOLDER, ignore_errors=True)


def _create(place: Path, rank: int, forms: Sequence[_Form]) -> Arrays:
    """Create the files of a process's arrays, and map them to be written."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(place, error) from error
    return tuple(create_mapped(_path(place, rank, number), *form) for number, form in enumerate(forms))


def _map(place: Path, rank: int, forms: Sequence[_Form], mode: Literal["r", "r+"] = "r") -> Arrays:
    arrays: list[npt.NDArray[Any]] = []
    for number, (dtype, shape) in enumerate(forms):
        path = _path(place, rank, number)
        try:
            mapped = math.prod(shape) > 0  # else there is no file
            arrays.append(np.memmap(path, dtype, mode, shape=shape) if mapped else np.empty(shape, dtype))
        except FileNotFoundError as error:
            raise ClipcidError(
                f"{error.filename} was written by another process of the run, but not every host has it.",
                "Use a --work that all hosts share.",
            ) from error
    return tuple(array if mode == "r+" else array.view(np.ndarray) for array in arrays)


def _path(place: Path, rank: int, number: int) -> Path:
    return place / f"{rank}-{number}"
