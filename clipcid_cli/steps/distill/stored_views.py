"""The views that `embed --views` stored, replayed: which one a sample shows in an epoch, and what replays it."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from clipcid_cli.formats.embeddings.extras import ViewParams
from clipcid_cli.runtime.models.augment import View
from clipcid_cli.runtime.randomness import derive_seed


@dataclasses.dataclass(frozen=True)
class StoredView:
    """A view the teacher has embedded.

    Attributes:
        number: Its number among the image's views, 0 … V − 1.
        packed: What replays it, 16 numbers.
    """

    number: int
    packed: tuple[float, ...]

    def unpack(self) -> View:
        """Return its box and colour map."""
        return View.unpack(np.array(self.packed, dtype=np.float32))


@dataclasses.dataclass(frozen=True)
class StoredViews:
    """The stored views of a run's samples. In V epochs a sample shows each of its V views once.

    Attributes:
        places: Row of the embeddings of each usable sample, int64; −1 where there is none.
        seed: Decides with which view a sample begins.
    """

    params: ViewParams
    places: npt.NDArray[np.int64]
    seed: int

    def choose(self, row: int, epoch: int, key: str) -> StoredView:
        """Return the view that a sample, its row among the usable ones, shows in an epoch."""
        number = (derive_seed("view", self.seed, key) + epoch) % self.params.num_views
        return StoredView(number, tuple(self.params.read(int(self.places[row]), number).tolist()))
