"""A fingerprint of a data set's images, classes and captions, for what is measured or kept of them.

A shard's own fingerprint tells a moved or resized file; an image that was replaced by another of the same size, in a folder,
a list or the midst of a tar, it may not. Here every image counts: its size, its first and last bytes, its classes
and its captions. Compressed images that differ differ there, in their header, their tables or their end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clipcid_cli.formats.dataset import Dataset
from clipcid_cli.formats.samples import Location, Sample

_WINDOW = 4096
_SAMPLES_A_TASK = 256


def fingerprint_images(dataset: Dataset, uses: Callable[[Sample], bool] = lambda _: True) -> dict[str, Any]:
    """Describe all images of a data set, where they lie in local files.

    Args:
        dataset: The data.
        uses: Tells whether a sample is used; the others do not count.

    Returns:
        ``path``, ``size`` (number of images used) and ``hash``, as of a sidecar's input. Of a remote image only
        the name counts.
    """
    samples = [sample for shard in dataset.shards for sample in shard.samples() if uses(sample)]
    parts = [samples[start : start + _SAMPLES_A_TASK] for start in range(0, len(samples), _SAMPLES_A_TASK)]
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(16) as pool:
        for part in pool.map(_digest, parts):
            digest.update(part)
    return {
        "path": f"{dataset.spec}#images",
        "size": len(samples),
        "hash": f"blake2b-windows:{digest.hexdigest()}",
    }


def _digest(samples: Sequence[Sample]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(
            repr((sample.key, sample.label, sample.labels, sample.captions)).encode("utf-8", errors="surrogateescape")
        )
        for location in (sample.image, sample.multi_hot):
            if location is not None:
                digest.update(_read_ends(location))
    return digest.digest()


def _read_ends(location: Location) -> bytes:
    """Return the size and both ends of the bytes; the name where they are remote, nothing where they are missing."""
    if "://" in location.path:
        return location.path.encode("utf-8", errors="surrogateescape")
    try:
        handle = os.open(location.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""  # counted as unreadable when it is decoded
    try:
        size = os.fstat(handle).st_size if location.size is None else location.size
        last = location.offset + max(0, size - _WINDOW)
        head = os.pread(handle, min(size, _WINDOW), location.offset)
        return b"%d:" % size + head + os.pread(handle, min(size, _WINDOW), last)
    finally:
        os.close(handle)
