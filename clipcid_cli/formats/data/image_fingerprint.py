"""A hash of the images of a data set: an evaluation is of these very images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from clipcid_cli.formats.data.addresses import is_url
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.files import open_regular
from clipcid_cli.formats.fingerprint import FileRecord

# Of these forms only the head and the tail of an image are hashed.
_COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8")
_WINDOW = 4096
_HASHED_AT_ONCE = 256


def fingerprint_images(dataset: Dataset, samples: Iterable[Sample] | None = None) -> FileRecord:
    """Describe all images of a data set, or those of its samples that are used, in order; `size` is their number.

    A shard's own fingerprint may miss an image that was replaced by another of the same size. Here every image counts: its
    size, bytes, classes and captions. Of JPEG, PNG, WebP and GIF the first and last 4 KiB are read: different compressed
    images of the same size differ there, in their tables, their data or a checksum. Of other forms (BMP, TIFF, …), where a
    white border may fill both ends, all bytes are.

    Of a remote image only the name is included. Shards that are streamed are not read for it: their own fingerprints are
    included, and `size` is their bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    if any(shard.is_streamed for shard in dataset.shards):
        shards = dataset.fingerprints()
        size = sum(shard.size for shard in shards)
        kind = "shards"
        digest.update(repr([(shard.size, shard.hash) for shard in shards]).encode())
    else:
        if samples is None:
            samples = (sample for shard in dataset.shards for sample in shard.samples())
        listed = list(samples)
        size = len(listed)
        kind = "windows"
        blocks = [listed[start : start + _HASHED_AT_ONCE] for start in range(0, size, _HASHED_AT_ONCE)]
        with ThreadPoolExecutor(16) as pool:
            for part in pool.map(_hash_samples, blocks):
                digest.update(part)
    return FileRecord(f"{dataset.spec}#images", size, f"blake2b-{kind}:{digest.hexdigest()}")


def _hash_samples(samples: Sequence[Sample]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        content = (sample.key, sample.label, sample.labels, sample.captions)
        digest.update(repr(content).encode("utf-8", errors="surrogateescape"))
        for place in (sample.image, sample.multi_hot):
            if place is not None:
                digest.update(_read_ends(place))
    return digest.digest()


def _read_ends(place: ByteRange) -> bytes:
    """Return the size and the bytes to hash; the URL of a remote image, nothing of a missing one."""
    if is_url(place.path):
        return place.path.encode("utf-8", errors="surrogateescape")
    try:
        with open_regular(place.path) as file:
            size = os.fstat(file.fileno()).st_size if place.size is None else place.size
            head = os.pread(file.fileno(), min(size, _WINDOW), place.offset)
            rest = size - len(head)
            if head.startswith(_COMPRESSED) or size > place.max_bytes:  # which is not decoded
                rest = min(rest, _WINDOW)
            return b"%d:" % size + head + os.pread(file.fileno(), rest, place.offset + size - rest)
    except OSError:
        return b""  # counted as unreadable when it is decoded
