"""``repair.npz``: the map by which a teacher's image rows are repaired; what was found lies in the sidecar beside it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.arrays import save_arrays
from clipcid_cli.formats.reading import reading

REPAIR = "repair.npz"
STEP = "repair"
_MAP = "image_map"


def write_repair(folder: Path, map_DD: npt.NDArray[np.float32]) -> None:
    """Write a map, float32 [D, D]."""
    save_arrays(folder / REPAIR, {_MAP: map_DD})


def read_repair(folder: Path) -> npt.NDArray[np.float32]:
    """Read what `write_repair` wrote, float32 [D, D]."""
    path = folder / REPAIR
    with reading(path, "a repair", f"Remove {folder}: it is made again.") as file:
        with np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays:
            found = arrays[_MAP]
        if found.dtype != np.float32 or found.ndim != 2 or not np.isfinite(found).all():
            raise ValueError(f"it holds {found.dtype} {list(found.shape)}, not finite float32 [D, D]")
    return np.asarray(found)
