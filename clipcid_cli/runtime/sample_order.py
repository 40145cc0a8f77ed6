"""The order in which training shows its samples: a function of seed and epoch, so that no process keeps a state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from clipcid_cli.runtime.randomness import derive_seed

SHARDS_MIXED = 16
"""Shards whose samples are shuffled together."""


def epoch_order(seed: int, epoch: int, shard_sizes: Sequence[int], group: int = SHARDS_MIXED) -> npt.NDArray[np.int64]:
    """Order one epoch's samples: shards are shuffled and dealt into groups, samples are shuffled within each group.

    Reading stays local to `group` shards at a time while every sample can still meet samples of any other shard; with at
    most `group` shards this is a plain uniform shuffle.

    Args:
        epoch: Number of the epoch, from 0.
        shard_sizes: Samples of each shard; rows are numbered through all shards in order.
        group: Shards that are mixed at once.

    Returns:
        int64 [sum(shard_sizes)], each row once; a function of the arguments only.
    """
    generator = np.random.default_rng(derive_seed("epoch", seed, epoch))
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    shards = generator.permutation(len(shard_sizes))
    parts: list[npt.NDArray[np.int64]] = []
    for first in range(0, len(shards), group):
        rows = [np.arange(starts[shard], starts[shard + 1], dtype=np.int64) for shard in shards[first : first + group]]
        mixed = np.concatenate(rows)
        generator.shuffle(mixed)
        parts.append(mixed)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class SampleOrder:
    """The samples of a run, one epoch after the other without end."""

    def __init__(self, seed: int, shard_sizes: Sequence[int]) -> None:
        self._size = sum(shard_sizes)
        # A batch may run on across the end of an epoch.
        self._epoch_order = lru_cache(2)(lambda epoch: epoch_order(seed, epoch, shard_sizes))

    def __len__(self) -> int:
        """Samples of one epoch."""
        return self._size

    def between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return (epoch, row) of samples number start … stop − 1 of the run; rows as in `epoch_order`."""
        epochs = ((number // self._size, number % self._size) for number in range(start, stop))
        return [(epoch, int(self._epoch_order(epoch)[place])) for epoch, place in epochs]
