"""``repair.npz``: the map by which a teacher's image rows are repaired; its figures lie in the sidecar beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.sidecar import Sidecar
from clipcid_cli.records import Repair

REPAIR = "repair.npz"
STEP = "repair"
_MAP = "image_map"


class RepairSidecar(Sidecar, kw_only=True):
    """``repair.json``, beside ``repair.npz`` where the repair is taken."""

    result: Repair


def write_repair(folder: Path, map_DD: npt.NDArray[np.float32]) -> None:
    """Write a map, float32 [D, D]."""
    save_arrays(folder / REPAIR, {_MAP: map_DD})


def read_repair(folder: Path, written: FileRecord) -> npt.NDArray[np.float32]:
    """Read what `write_repair` wrote, float32 [D, D]; `written` is what the sidecar records of it."""
    path = folder / REPAIR
    arrays = load_arrays(path)
    if arrays is None or record(path).content != written.content:
        raise ClipcidError(
            f"{path} is damaged: it is not the file that {STEP}.json says was written.",
            f"Remove {folder}: the next run decides again.",
        )
    return arrays[_MAP]
