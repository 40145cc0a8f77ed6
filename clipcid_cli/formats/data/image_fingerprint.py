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
from clipcid_cli.formats.reading import open_regular

_WINDOW = 4096
_COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8")
_AT_ONCE = 256


def fingerprint_images(dataset: Dataset, samples: Iterable[Sample] | None = None) -> FileRecord:
    """Describe all images of a data set, or those of its samples that are used, in order; `size` is their number.

    Of a remote image only the name is included. Tars behind a URL are not read for it: their own fingerprints are included,
    and `size` is their bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    if any(is_remote(shard.file) for shard in dataset.shards):
        shards = dataset.fingerprints()
        size = sum(each.size for each in shards)
        kind = "shards"
        digest.update(repr([(each.size, each.hash) for each in shards]).encode())
    else:
        if samples is None:
            samples = (sample for shard in dataset.shards for sample in shard.samples())
        found = list(samples)
        size = len(found)
        kind = "windows"
        with ThreadPoolExecutor(16) as pool:
            for part in pool.map(_digest, [found[at : at + _AT_ONCE] for at in range(0, size, _AT_ONCE)]):
                digest.update(part)
    return FileRecord(f"{dataset.spec}#images", size, f"blake2b-{kind}:{digest.hexdigest()}")


def _digest(samples: Sequence[Sample]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        content = (sample.key, sample.label, sample.labels, sample.captions)
        digest.update(repr(content).encode("utf-8", errors="surrogateescape"))
        for place in (sample.image, sample.multi_hot):
            if place is not None:
                digest.update(_read(place))
    return digest.digest()


def _read(place: ByteRange) -> bytes:
    """Return the size and the bytes to hash; the URL of a remote image, nothing of a missing one."""
    if is_url(place.path):
        return place.path.encode("utf-8", errors="surrogateescape")
    try:
        with open_regular(place.path) as file:
            size = os.fstat(file.fileno()).st_size if place.size is None else place.size
            head = os.pread(file.fileno(), min(size, _WINDOW), place.offset)
            rest = size - len(head)
            if head.startswith(_COMPRESSED):
                rest = min(rest, _WINDOW)
            return b"%d:" % size + head + os.pread(file.fileno(), rest, place.offset + size - rest)
    except OSError:
        return b""  # counted as unreadable when it is decoded
