"""A fingerprint of a data set's images, classes and captions, for metrics and features computed from them.

A shard's own fingerprint detects a moved or resized file, but perhaps not an image that was replaced by another of the same
size in a folder, a list or the middle of a tar. Here every image counts: its size, bytes, classes and captions. Of JPEG,
PNG, WebP and GIF the first and last 4 KiB are read: different compressed images of the same size differ there, in their
tables, their data or a checksum. Of other forms (BMP, TIFF, …), where a white border may fill both ends, all bytes are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.remote import is_remote, is_url
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.fingerprint import FileRecord

_WINDOW = 4096
_COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8")
_AT_ONCE = 256


def fingerprint_images(dataset: Dataset, samples: Iterable[Sample] | None = None) -> FileRecord:
    """Describe all images of a data set.

    Args:
        samples: Those of its samples that are used, in order; None for all.

    Returns:
        ``path``, ``size`` (number of images used) and ``hash``, as of a sidecar's input. Of a remote image only the name is
        included. Tars behind a URL are not read for it: their own fingerprints are included, and ``size`` is their bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    if any(is_remote(shard.file) for shard in dataset.shards):
        shards = dataset.fingerprints()
        size, kind = sum(each.size for each in shards), "shards"
        digest.update(repr([(each.size, each.hash) for each in shards]).encode())
    else:
        if samples is None:
            samples = (sample for shard in dataset.shards for sample in shard.samples())
        found = list(samples)
        size, kind = len(found), "windows"
        with ThreadPoolExecutor(16) as pool:
            for part in pool.map(_digest, [found[at : at + _AT_ONCE] for at in range(0, size, _AT_ONCE)]):
                digest.update(part)
    return FileRecord(f"{dataset.spec}#images", size, f"blake2b-{kind}:{digest.hexdigest()}")


def _digest(samples: Sequence[Sample]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        digest.update(
            repr((sample.key, sample.label, sample.labels, sample.captions)).encode("utf-8", errors="surrogateescape")
        )
        for location in (sample.image, sample.multi_hot):
            if location is not None:
                digest.update(_read(location))
    return digest.digest()


def _read(location: ByteRange) -> bytes:
    """Return the size and the bytes to hash; the URL of a remote image, nothing of a missing one."""
    if is_url(location.path):
        return location.path.encode("utf-8", errors="surrogateescape")
    try:
        handle = os.open(location.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""  # counted as unreadable when it is decoded
    try:
        size = os.fstat(handle).st_size if location.size is None else location.size
        head = os.pread(handle, min(size, _WINDOW), location.offset)
        rest = size - len(head)
        if head.startswith(_COMPRESSED):
            rest = min(rest, _WINDOW)
        return b"%d:" % size + head + os.pread(handle, rest, location.offset + size - rest)
    finally:
        os.close(handle)
