"""Arrays of unfinished work, saved so that a killed run continues with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.atomic import atomic_file
from clipcid_cli.formats.reading import open_regular


def save_arrays(path: Path, **arrays: Any) -> None:
    """Save arrays, numbers and texts under names, whole or not at all."""
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """Load what `save_arrays` saved; None where nothing is, or it is damaged: the work is then done again."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as saved:
            return dict(saved)
    except Exception:  # numpy and zipfile raise what they like for a damaged archive
        return None
