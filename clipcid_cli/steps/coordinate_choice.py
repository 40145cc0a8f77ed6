"""By how many leading coordinates rows are compared with centres: whichever a trial finds fastest.

The answer is the same with any, so processes need not agree, and a trial that another program disturbs costs time only.
"""

from __future__ import annotations

import time

import torch

from clipcid_cli.algorithms.leading_coordinates import LeadingCoordinates, leading_coordinates, principal_directions
from clipcid_cli.algorithms.nearest_centres import Nearest, NearestCentres
from clipcid_cli.algorithms.prepared_rows import PreparedRows, prepare_rows
from clipcid_cli.runtime.machine import Machine

TRIAL_ROWS = 4096
_TIMED_ROWS = 512
_CENTRES = 16_384
# Shares of the width that are tried. Multiples of 16 numbers, the length of what is left among them, suit the processor.
_SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
_NARROWEST = 128
# Turning the rows, and bounds that are less tight in the next iteration, must be paid for.
_GAIN = 0.8
_TRIALS = 2


def worth_a_trial(num_rows: int, num_centres: int, width: int) -> bool:
    """Tell whether a trial, most of which is finding the directions, takes little of the time of an iteration."""
    return num_rows * num_centres >= 256 * width * width


class CoordinateChoice:
    """The coordinates in use; tried with the first centres, and again once centres are means, which have shorter rests.

    Attributes:
        chosen: Which are multiplied; None for whole rows.
    """

    def __init__(self, dtype: torch.dtype, machine: Machine) -> None:
        """Begin with whole rows.

        Args:
            dtype: Format of the products. Only float32 ones of a CPU are slow enough for a choice.
            machine: Where they are computed.
        """
        self.chosen: LeadingCoordinates | None = None
        self._device = machine.device
        self._left = _TRIALS if dtype == torch.float32 and machine.device.type == "cpu" else 0
        self._directions_DD: torch.Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is still a trial to make."""
        return self._left > 0

    def choose(self, rows_BD: torch.Tensor, centres_KD: torch.Tensor, known: Nearest | None) -> bool:
        """Make a trial.

        Args:
            rows_BD: Rows from all over the data, float16 [B, D].
            centres_KD: The centres as they are, float32 [K, D].
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
            known = _as_now(known.chosen(timed), timed_BD, centres_KD)
        centres_KD = centres_KD[:_CENTRES]
        best, fewest = None, _GAIN * _seconds(timed_BD, centres_KD, None, known)
        for share in _SHARES:
            coordinates = leading_coordinates(self._directions_DD, int(width * share) // 16 * 16 - 1)
            seconds = _seconds(timed_BD, centres_KD, coordinates, known)
            if seconds < fewest:
                best, fewest = coordinates, seconds
        before = 0 if self.chosen is None else self.chosen.width
        self.chosen = best
        return before != (0 if best is None else best.width)


def _as_now(known: Nearest, rows_BD: torch.Tensor, centres_KD: torch.Tensor) -> Nearest:
    """Bring the similarity to the nearest centre up to date after the centres moved."""
    own_BD = centres_KD[known.centres_B].double()
    return Nearest(known.centres_B, (rows_BD.double() * own_BD).sum(dim=1), known.others_B)


def _seconds(
    rows_BD: torch.Tensor, centres_KD: torch.Tensor, coordinates: LeadingCoordinates | None, known: Nearest | None
) -> float:
    search = NearestCentres(centres_KD, torch.float32, coordinates=coordinates)
    rows: PreparedRows = prepare_rows(rows_BD, torch.float32, coordinates)
    search.nearest(rows, known)
    began = time.perf_counter()
    search.nearest(rows, known)
    return time.perf_counter() - began
