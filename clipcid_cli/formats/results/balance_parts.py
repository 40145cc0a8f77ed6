"""What an unfinished `balance` has found: parts of the forest, and the nearest reference rows stretch by stretch."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.arrays import load_arrays, save_arrays

_FOREST = ".forest-parts"
_REFERENCES = ".references"


@dataclasses.dataclass(frozen=True)
class ForestPart:
    """What one process has found in the first tiles of its share: all pairs, or their forest.

    A session is one run of a search; the next one, after it was stopped, divides what is left of its tiles.

    Attributes:
        rank: Number of the process, of `size`.
        tiles: The tiles that the session divides, ranges of their numbers: start, stop and step, int64 [R, 3].
        done: How many tiles of its share the process has finished.
        a: Smaller row of each edge, integers [E].
        b: Larger row, integers [E].
        distance: Their distance, float32 [E].
        has_all: Whether these are all pairs.
    """

    session: int
    rank: int
    size: int
    tiles: npt.NDArray[np.int64]
    done: int
    a: npt.NDArray[np.signedinteger[Any]]
    b: npt.NDArray[np.signedinteger[Any]]
    distance: npt.NDArray[np.float32]
    has_all: bool


@dataclasses.dataclass(frozen=True)
class ForestParts:
    """The parts of a search in the folder of `balance`; those of another cut-off or other tiles have another name."""

    folder: Path
    search: str

    @property
    def path(self) -> Path:
        """Where the parts of this search lie."""
        return self.folder / _FOREST / self.search

    def next_session(self) -> int:
        """Return a session number that no earlier run has used."""
        return 1 + max((int(path.name.split("-")[0]) for path in self.path.glob("*-*.npz")), default=-1)

    def write(self, part: ForestPart) -> None:
        """Save the part of one process, replacing what it saved before in the same session."""
        save_arrays(self.path / f"{part.session}-{part.rank}.npz", dataclasses.asdict(part))

    def read(self, session: int) -> Iterator[ForestPart]:
        """Read the parts of a session. One that cannot be read is skipped: its tiles are searched again."""
        for path in sorted(self.path.glob(f"{session}-*.npz")):
            found = load_arrays(path)
            if found is not None:
                values: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in found.items()}
                yield ForestPart(**values)

    def clear(self) -> None:
        """Remove the parts of this and every earlier search."""
        shutil.rmtree(self.folder / _FOREST, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class ReferenceParts:
    """The stretches of one comparison in the folder of `balance`, named after rows, reference and distance."""

    folder: Path
    name: str

    def write(self, stretch: int, reference: npt.NDArray[np.int64], distance: npt.NDArray[np.float32]) -> None:
        """Save a stretch of M rows.

        Args:
            reference: The nearest reference row of each row, int64 [M]; −1 where none is near enough.
            distance: Its distance, float32 [M].
        """
        save_arrays(self._path(stretch), {"reference": reference, "distance": distance})

    def read(self, stretch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
        """Read a stretch; None where it must be compared again."""
        found = load_arrays(self._path(stretch))
        return None if found is None else (found["reference"], found["distance"])

    def _path(self, stretch: int) -> Path:
        return self.folder / _REFERENCES / self.name / f"{stretch}.npz"


def keep_references(folder: Path, names: set[str]) -> None:
    """Remove the stretches of all comparisons but these, in the folder of `balance`."""
    for path in (folder / _REFERENCES).glob("*") if names else [folder / _REFERENCES]:
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)
