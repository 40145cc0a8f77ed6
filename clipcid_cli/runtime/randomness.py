"""Randomness that depends on names and numbers only, never on what ran before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def derive_seed(*parts: int | str) -> int:
    """Mix words and numbers into a seed in [0, 2⁶³): the same parts give the same seed on any machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def key_fraction(key: str) -> float:
    """Map a sample's key to [0, 1) evenly; a hold-out is the keys below its fraction, whatever the order of the data."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


def key_fractions(keys: Iterable[str]) -> npt.NDArray[np.float64]:
    """Return `key_fraction` of each of n keys, float64 [n]."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8") / 2.0**64
