"""The diameter of each set: the largest distance of two of its rows.

Shape letters: N rows, D width, S sets of one size, M rows of a set.

Source: [O]. All pairs of a set are compared, exactly; of large sets only the rows farthest from one another in turn, which
finds at least half of the diameter and no more than it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.near.exact import (
    FloatArray,
    IntArray,
    ReadRows,
    distance_matrix,
    round_distances,
    row_type,
    squared_lengths,
)

# Sets of more rows are swept. At this size all pairs take half a second on two cores where N is 100,000.
MOST_COMPARED = 1024
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
    is_exact: npt.NDArray[np.bool_]


def find_diameters(read: ReadRows, rows: IntArray, labels: IntArray, device: torch.device) -> Diameters:
    """Find the diameters of sets.

    Args:
        rows: Row numbers, integers [N], each once.
        labels: Set of each row, integers [N]; sets of one row are omitted.
    """
    order = np.argsort(labels, kind="stable").astype(row_type(len(rows)))
    ordered = labels[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(order) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(order)))
    starts, sizes = starts[sizes > 1], sizes[sizes > 1]
    diameter = np.zeros(len(starts), np.float32)
    for size in np.unique(sizes).tolist():
        sets_S = np.flatnonzero(sizes == size)
        if size > MOST_COMPARED:
            for each in sets_S.tolist():
                diameter[each] = _sweep(read, rows[order[starts[each] : starts[each] + size]], device)
            continue
        at_once = max(1, _ROWS_AT_ONCE // size)
        for at in range(0, len(sets_S), at_once):
            part = sets_S[at : at + at_once]
            members_SM = order[starts[part][:, None] + np.arange(size)]
            diameter[part] = _compare(read, rows[members_SM], device)
    return Diameters(ordered[starts], diameter, sizes <= MOST_COMPARED)


def _compare(read: ReadRows, members_SM: IntArray, device: torch.device) -> FloatArray:
    """Return the largest distance within each of S sets of one size, float32 [S]."""
    stored = torch.from_numpy(read(members_SM.reshape(-1))).to(device)
    squared_SM = squared_lengths(stored).view(members_SM.shape)
    wide_SMD = stored.to(torch.float64).view(*members_SM.shape, -1)
    dots_SMM = torch.bmm(wide_SMD, wide_SMD.transpose(1, 2))
    squared_SMM = squared_SM[:, :, None] + squared_SM[:, None, :] - 2.0 * dots_SMM
    found: FloatArray = round_distances(squared_SMM.amax(dim=(1, 2))).cpu().numpy()
    return found


def _sweep(read: ReadRows, members: IntArray, device: torch.device) -> float:
    """Return the largest distance found by going to the farthest row again and again."""
    here, largest = members[:1], 0.0
    for _ in range(_SWEEPS):
        one = torch.from_numpy(read(here)).to(device)
        parts = []
        for at in range(0, len(members), _ROWS_AT_ONCE):
            part = torch.from_numpy(read(members[at : at + _ROWS_AT_ONCE])).to(device)
            parts.append(distance_matrix(one, part)[0].cpu().numpy())
        distances = np.concatenate(parts)
        farthest = int(distances.argmax())
        if float(distances[farthest]) <= largest:
            break
        here, largest = members[farthest : farthest + 1], float(distances[farthest])
    return largest
