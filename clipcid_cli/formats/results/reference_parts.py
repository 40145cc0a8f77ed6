"""The nearest reference row of each row, saved stretch by stretch, so that a stopped comparison continues."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.arrays import load_arrays, save_arrays

_FOLDER = ".references"

Nearest = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class ReferenceParts:
    """The stretches of one comparison with one reference.

    Attributes:
        folder: The folder of `balance`.
        name: Identifies rows, reference and distance.
    """

    folder: Path
    name: str

    def write(self, stretch: int, reference: npt.NDArray[np.int64], distance: npt.NDArray[np.float32]) -> None:
        """Save a stretch of M rows.

        Args:
            stretch: Its number.
            reference: The nearest reference row of each row, int64 [M]; −1 where none is near enough.
            distance: Its distance, float32 [M].
        """
        save_arrays(self._path(stretch), {"reference": reference, "distance": distance})

    def read(self, stretch: int, num_rows: int) -> Nearest | None:
        """Read a stretch of so many rows; None where it is not there, or cannot be read."""
        found = load_arrays(self._path(stretch)) or {}
        shapes = {name: (array.shape, array.dtype.str) for name, array in found.items()}
        if shapes != {"reference": ((num_rows,), "<i8"), "distance": ((num_rows,), "<f4")}:
            return None
        return found["reference"], found["distance"]

    def _path(self, stretch: int) -> Path:
        return self.folder / _FOLDER / self.name / f"{stretch}.npz"


def keep_parts(folder: Path, names: set[str]) -> None:
    """Remove the stretches of all comparisons but these, in the folder of `balance`."""
    inside = folder / _FOLDER
    for path in inside.iterdir() if inside.is_dir() else ():
        if path.name not in names:
            shutil.rmtree(path, ignore_errors=True)
    if not names:
        shutil.rmtree(inside, ignore_errors=True)
