"""Randomness that depends on names and numbers only, never on what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def derive_seed(*parts: int | str) -> int:
    """Mix words and numbers into a seed in [0, 2⁶³): the same parts give the same seed on any machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def key_fraction(key: str) -> float:
    """Map a sample's key to [0, 1) evenly; a hold-out is the keys below its fraction, whatever the order of the data."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


SHARDS_MIXED = 16
"""Shards whose samples are shuffled among each other."""


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
