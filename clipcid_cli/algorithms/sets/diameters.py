"""The diameter of each set: the largest distance of two of its rows.

Shape letters: N rows, D width, S sets of one size, M rows of a set.

Source: [O]. All pairs of a set are compared, exactly; of large sets only the rows farthest from one another in turn, which
finds at least half of the diameter and no more than it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from clipcid_cli.algorithms.near.block import read_stored
from clipcid_cli.algorithms.near.exact import (
    BoolArray,
    FloatArray,
    IntArray,
    ReadRows,
    distance_matrix,
    edge_weights,
    row_type,
    squared_lengths,
)

# Sets of more rows are swept. At this size all pairs take half a second on two cores where N is 100,000.
MAX_COMPARED = 1024
_ROWS_AT_ONCE = 4096
_SWEEPS = 3


@dataclasses.dataclass(frozen=True)
class Diameters:
    """The diameters of sets of two or more rows.

    Attributes:
        label: The smallest row of each set, ascending, integers [S].
        diameter: Largest distance of two of its rows, float32 [S]; where it is not exact, at least half of that.
        is_exact: Whether all pairs were compared, bool [S].
    """

    label: IntArray
    diameter: FloatArray
    is_exact: BoolArray


def find_diameters(read: ReadRows, rows: IntArray, labels: IntArray, device: torch.device) -> Diameters:
    """Find the diameters of sets, given the set of each of some row numbers; sets of one row are omitted."""
    order = np.argsort(labels, kind="stable").astype(row_type(len(rows)))
    label, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    several = sizes > 1
    label, starts, sizes = label[several], starts[several], sizes[several]
    diameter = np.zeros(len(starts), np.float32)
    for size in np.unique(sizes).tolist():
        sets_S = np.flatnonzero(sizes == size)
        at_once = max(1, _ROWS_AT_ONCE // size)
        for part in (sets_S[at : at + at_once] for at in range(0, len(sets_S), at_once)):
            members_SM = rows[order[starts[part][:, None] + np.arange(size)]]
            if size <= MAX_COMPARED:
                diameter[part] = _compare(read, members_SM, device)
            else:
                diameter[part] = [_sweep(read, members_M, device) for members_M in members_SM]
    return Diameters(label, diameter, sizes <= MAX_COMPARED)


def _compare(read: ReadRows, members_SM: IntArray, device: torch.device) -> FloatArray:
    """Return the largest distance within each of S sets of one size, float32 [S]."""
    stored = read_stored(read, members_SM.reshape(-1), device)
    squared_SM = squared_lengths(stored).view(members_SM.shape)
    wide_SMD = stored.double().view(*members_SM.shape, -1)
    weight_SMM = edge_weights(squared_SM[:, :, None], squared_SM[:, None, :], torch.bmm(wide_SMD, wide_SMD.mT))
    found: FloatArray = weight_SMM.amax(dim=(1, 2)).cpu().numpy()
    return found


def _sweep(read: ReadRows, members: IntArray, device: torch.device) -> float:
    """Return the largest distance found by going to the farthest row again and again."""
    here, largest = members[:1], 0.0
    for _ in range(_SWEEPS):
        one = read_stored(read, here, device)
        starts = range(0, len(members), _ROWS_AT_ONCE)
        parts = (read_stored(read, members[at : at + _ROWS_AT_ONCE], device) for at in starts)
        distance = torch.cat([distance_matrix(one, part)[0] for part in parts])
        farthest = int(distance.argmax())
        if float(distance[farthest]) <= largest:
            break
        here, largest = members[farthest : farthest + 1], float(distance[farthest])
    return largest
