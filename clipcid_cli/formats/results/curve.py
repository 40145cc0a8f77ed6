"""The keep curve: how many images are kept at each cut-off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from clipcid_cli.formats.atomic import write_csv

CURVE = "curve.csv"


def write_curve(
    path: Path,
    *,
    distances: npt.NDArray[np.float32],
    kept: npt.NDArray[np.int64],
    largest: npt.NDArray[np.int64],
    num_images: int,
) -> None:
    """Write the curve, whole or not at all.

    Args:
        distances: Cut-offs, ascending, float32 [C]; written with the fewest digits that denote the same float32.
        kept: Images kept at each, int64 [C].
        largest: Images in the largest set at each, int64 [C].
    """
    frame = pd.DataFrame(
        {
            "distance": [str(distance) for distance in distances],
            "kept": kept,
            "keep_ratio": [f"{count / num_images:.6f}" for count in kept.tolist()],
            "largest_component": largest,
        }
    )
    write_csv(path, frame)
