"""Randomness that depends on names and numbers only, never on what ran before: seeds, and the order of training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

SHARDS_MIXED = 16
"""Shards whose samples are shuffled together."""


def derive_seed(*parts: int | str) -> int:
    """Mix words and numbers into a seed in [0, 2⁶³): the same parts give the same seed on any machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def key_fractions(keys: Iterable[str]) -> npt.NDArray[np.float64]:
    """Map n keys to [0, 1) evenly, float64 [n]; a hold-out is the keys below its fraction, in whatever order they come."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8") / 2.0**64


def epoch_groups(
    seed: int, epoch: int, shard_sizes: Sequence[int], group: int = SHARDS_MIXED
) -> Iterator[npt.NDArray[np.int64]]:
    """Order one epoch's samples: shards are shuffled and dealt into groups, samples are shuffled within each group.

    Reading stays local to `group` shards at a time while every sample can still meet samples of any other shard; with at
    most `group` shards this is a plain uniform shuffle. Rows, int64, are numbered through all shards in order.
    """
    generator = np.random.default_rng(derive_seed("epoch", seed, epoch))
    starts = np.concatenate([[0], np.cumsum(shard_sizes, dtype=np.int64)])
    shards = generator.permutation(len(shard_sizes))
    for first in range(0, len(shards), group):
        rows = [np.arange(starts[shard], starts[shard + 1], dtype=np.int64) for shard in shards[first : first + group]]
        mixed = np.concatenate(rows)
        generator.shuffle(mixed)
        yield mixed


class SampleOrder:
    """The samples of a run, one epoch after the other without end; one group of an epoch is held at a time.

    Groups are generated in sequence, so reading on costs nothing extra. A start in the middle of an epoch generates the
    groups before it, 13 ns a sample: 5 s at the end of an epoch of 400 million. Going back starts the epoch anew.
    """

    def __init__(
        self, seed: int, shard_sizes: Sequence[int], on_group: Callable[[Sequence[int]], None] | None = None
    ) -> None:
        """`on_group` is told, as each group begins, its shards and those of the next group."""
        self._seed = seed
        self._shard_sizes = shard_sizes
        self._on_group = on_group
        self._size = sum(shard_sizes)
        self._epoch = -1  # none is begun
        self._first = 0  # number in the run of the first sample of the group that is held
        self._rows = np.empty(0, dtype=np.int64)

    def rows(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the rows of samples number start … stop − 1 of the run, numbered as in `epoch_groups`."""
        found = [np.empty(0, dtype=np.int64)]
        while start < stop:
            found.append(self._rest_of_group(start)[: stop - start])
            start += len(found[-1])
        return np.concatenate(found)

    def _rest_of_group(self, number: int) -> npt.NDArray[np.int64]:
        """Return the rows from a sample of the run on, to the end of its group."""
        epoch = number // self._size
        if epoch != self._epoch or number < self._first:
            self._epoch = epoch
            self._groups = enumerate(epoch_groups(self._seed, epoch, self._shard_sizes))
            self._first = epoch * self._size
            self._rows = self._rows[:0]
        group = None
        while number >= self._first + len(self._rows):
            self._first += len(self._rows)
            group, self._rows = next(self._groups)
        if group is not None and self._on_group is not None:
            self._on_group(self._upcoming_shards(group * SHARDS_MIXED))
        return self._rows[number - self._first :]

    def _upcoming_shards(self, first: int) -> list[int]:
        """List the shards of the group that begins with an epoch's shard number `first`, and of the next group."""
        count = len(self._shard_sizes)
        epochs = (self._epoch, self._epoch + 1)  # the next group may be the first of the next epoch
        generators = [np.random.default_rng(derive_seed("epoch", self._seed, epoch)) for epoch in epochs]
        shards = np.concatenate([generator.permutation(count) for generator in generators])  # as `epoch_groups` does
        end = min(first + SHARDS_MIXED, count) + SHARDS_MIXED
        return [shard for shard in shards[first:end].tolist() if self._shard_sizes[shard]]
