"""By how many leading coordinates rows are compared with centroids: whichever a trial finds fastest.

The answer is the same with any, so processes need not agree, and a trial that another program disturbs costs time only.
Turning rows into coordinates takes longer than comparing them with a thousand centroids, so only rows that are kept from
iteration to iteration are turned, and that is counted.
"""

from __future__ import annotations

import dataclasses

import torch

from clipcid_cli.algorithms.kmeans.best_so_far import Nearest
from clipcid_cli.algorithms.kmeans.leading_coordinates import (
    LeadingCoordinates,
    leading_coordinates,
    principal_directions,
)
from clipcid_cli.algorithms.kmeans.nearest import NearestCentroids
from clipcid_cli.algorithms.kmeans.prepared import prepare_rows
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.timing import time_trial

TRIAL_ROWS = 4096
_TIMED_ROWS = 512
_CENTROIDS = 4096
# Shares of the width that are tried. Multiples of 16 numbers, the length of what is left among them, suit the processor.
_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
_NARROWEST = 128
# Bounds that are less tight in the next iteration must be paid for.
_GAIN = 0.8
# Iterations over which turning the rows is spread; the centroids are turned in each.
_ITERATIONS = 3


def worth_a_trial(num_rows: int, num_centroids: int, width: int, room: int) -> bool:
    """Tell whether a trial, most of which is finding the directions, takes little of the time of an iteration.

    Args:
        room: Bytes for prepared rows; those that do not fit would be turned anew in every iteration.
    """
    kept = num_rows * width * (2 + 4 * max(_SHARES))
    return num_rows * num_centroids >= 1024 * width * width and kept <= room


class CoordinateChoice:
    """The coordinates in use, tried in the first iterations in full: centroids that are means have shorter rests than rows.

    Attributes:
        chosen: Which are multiplied; None for whole rows.
    """

    def __init__(self, dtype: torch.dtype, machine: Machine, trials: int) -> None:
        """Begin with whole rows.

        Args:
            dtype: Format of the products. Only float32 ones of a CPU are slow enough for a choice.
            trials: In how many iterations to try.
        """
        self.chosen: LeadingCoordinates | None = None
        self._device = machine.device
        self._left = trials if dtype == torch.float32 and machine.device.type == "cpu" else 0
        self._directions_DD: torch.Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is still a trial to make."""
        return self._left > 0

    def choose(self, rows_BD: torch.Tensor, num_rows: int, centroids_KD: torch.Tensor, known: Nearest | None) -> bool:
        """Make a trial.

        Args:
            rows_BD: Rows from all over the data, float16 [B, D].
            num_rows: How many rows there are of which these are some.
            centroids_KD: The centroids as they are, float32 [K, D].
            known: What is known of the rows from the iteration before; None in the first.

        Returns:
            Whether another number of coordinates is chosen now.
        """
        self._left -= 1
        width = rows_BD.shape[1]
        if width < _NARROWEST:
            self._left = 0
            return False
        if self._directions_DD is None:
            self._directions_DD = principal_directions(rows_BD)
        timed = slice(None, None, max(1, len(rows_BD) // _TIMED_ROWS))
        timed_BD = rows_BD[timed].contiguous()
        if known is not None:
            known = _as_now(known.chosen(timed), timed_BD, centroids_KD)
        trial = _Trial(timed_BD, num_rows, centroids_KD[:_CENTROIDS], len(centroids_KD), known)
        best, fewest = None, _GAIN * trial.seconds(None)
        for share in _SHARES:
            coordinates = leading_coordinates(self._directions_DD, int(width * share) // 16 * 16 - 1)
            seconds = trial.seconds(coordinates)
            if seconds < fewest:
                best, fewest = coordinates, seconds
        before = 0 if self.chosen is None else self.chosen.width
        self.chosen = best
        return before != (0 if best is None else best.width)


def _as_now(known: Nearest, rows_BD: torch.Tensor, centroids_KD: torch.Tensor) -> Nearest:
    """Bring the similarity to the nearest centroid up to date after the centroids moved."""
    own_BD = centroids_KD[known.centroids_B].double()
    return Nearest(known.centroids_B, (rows_BD.double() * own_BD).sum(dim=1), known.others_B)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """Some rows and centroids that stand for all.

    Attributes:
        rows_BD: The rows, float16 [B, D].
        num_rows: How many they stand for.
        centroids_KD: The centroids, float32 [K, D].
        num_centroids: How many they stand for.
        known: What is known of the rows.
    """

    rows_BD: torch.Tensor
    num_rows: int
    centroids_KD: torch.Tensor
    num_centroids: int
    known: Nearest | None

    def seconds(self, coordinates: LeadingCoordinates | None) -> float:
        """Estimate the seconds of an iteration over all rows and centroids."""
        preparing_rows, rows = time_trial(lambda: prepare_rows(self.rows_BD, torch.float32, coordinates))
        preparing_centroids, search = time_trial(
            lambda: NearestCentroids(self.centroids_KD, torch.float32, coordinates=coordinates)
        )
        comparing = time_trial(lambda: search.nearest(rows, self.known)).seconds
        share_of_rows, share_of_centroids = (
            len(self.rows_BD) / self.num_rows,
            len(self.centroids_KD) / self.num_centroids,
        )
        return (preparing_rows / _ITERATIONS + comparing / share_of_centroids) / share_of_rows + (
            preparing_centroids / share_of_centroids
        )
