"""The distance up to which to search, when what is asked for is a share of images to keep.

A search to a distance finds every forest edge up to it, so it must reach the (N − n)-th smallest edge of a forest nobody has
seen yet, and not much further. F(ε), the share of rows whose nearest neighbour is within ε, brackets it: each of those rows
has an edge to its nearest neighbour in the forest, and two rows may share one, so edges(ε) / N lies in [F(ε)/2, F(ε)).

Source: METHOD §1 [O], "First cut-off".
"""

from __future__ import annotations

import math

import numpy as np
import torch

from clipcid_cli.algorithms.distances import (
    LONGEST_ROW,
    FloatArray,
    IntArray,
    ReadRows,
    round_distances,
    squared_lengths,
)
from clipcid_cli.algorithms.neighbors import load_block

# No two rows are farther apart.
FARTHEST = 2.0 * LONGEST_ROW
# Reaching a little further costs little; a forest that runs short costs another search.
_FIRST_FACTOR = 1.15

_ROWS_AT_ONCE = 4096


def nearest_distances(read: ReadRows, rows: IntArray, sample: IntArray, device: torch.device) -> FloatArray:
    """Measure how far sampled rows are from their nearest neighbours.

    Args:
        read: Reads stored rows.
        rows: Rows to look among, int64 [N].
        sample: Positions in `rows` to look for, int64 [S].
        device: Where to compute.

    Returns:
        Exact distances to the nearest other row, float32 [S]; infinite when there is none.
    """
    wanted_SD = torch.from_numpy(np.ascontiguousarray(read(rows[sample]))).to(device)
    squared_S = squared_lengths(wanted_SD)
    wanted_SD = wanted_SD.to(torch.float64)
    nearest_S = torch.full_like(squared_S, math.inf)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = load_block(read, rows[start : start + _ROWS_AT_ONCE], device, torch.float16)
        squared_SN = squared_S[:, None] + block.squared - 2.0 * (wanted_SD @ block.stored.to(torch.float64).T)
        own = torch.from_numpy(np.flatnonzero((sample >= start) & (sample < start + len(block)))).to(device)
        squared_SN[own, torch.from_numpy(sample).to(device)[own] - start] = math.inf
        nearest_S = torch.minimum(nearest_S, squared_SN.amin(dim=1))
    return round_distances(nearest_S).cpu().numpy()


def first_cutoff(nearest_S: FloatArray, share: float) -> float:
    """Choose the distance of the first search.

    Args:
        nearest_S: Sampled distances to the nearest neighbour, float32 [S], S ≥ 1.
        share: Forest edges wanted, as a share of the rows, in (0, 1).

    Returns:
        The distance at which F is 1.15 times `share`.
    """
    position = min(len(nearest_S) - 1, math.ceil(_FIRST_FACTOR * share * len(nearest_S)))
    return float(min(np.sort(nearest_S)[position], np.float32(FARTHEST)))


def wider_cutoff(nearest_S: FloatArray, cutoff: float, found: int, wanted: int) -> float:
    """Choose the distance of the next search after one whose forest had too few edges.

    Args:
        nearest_S: Sampled distances to the nearest neighbour, float32 [S].
        cutoff: Distance of the last search.
        found: Edges its forest had.
        wanted: Edges needed.

    Returns:
        A larger distance: where F has grown in the proportion that is missing, and at least 5 % more, so that some
        search reaches ``FARTHEST``, at which the forest is complete.
    """
    reached = float(np.mean(nearest_S <= np.float32(cutoff)))
    share = 1.05 * reached * wanted / max(1, found)
    position = min(len(nearest_S) - 1, math.ceil(share * len(nearest_S)))
    return float(min(max(float(np.sort(nearest_S)[position]), 1.05 * cutoff, 1e-3), FARTHEST))
