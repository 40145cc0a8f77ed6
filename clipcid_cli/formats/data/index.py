"""The index of a data set: where each sample's image and captions are, listed once and read by every later start.

    <work>/index/<identity>/00000000.arrow   the samples of one shard, see `_SCHEMA`
    <work>/index/<identity>/shards.parquet   one row a shard: what the listing found, size and time of the shard's file

Listing a tar costs 30 to 45 µs a sample, and 400 million samples take hours of it. So each shard is listed once, by any
process, into a file of its own that appears whole; `shards.parquet` is written last. A shard whose file has another size or
modification time than recorded is listed again. A process holds the parts it used last, `PARTS_KEPT` of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file, write_parquet
from clipcid_cli.formats.data.samples import Location, Sample, Shard
from clipcid_cli.formats.key_join import hash_keys
from clipcid_cli.formats.skips import Skips

PARTS_KEPT = 48
"""Parts that a process holds: two groups of the shuffle's shards and some; 10,000 samples take about 0.7 MB."""

_TABLE = "shards.parquet"
# Hashes sorted together: half a GiB.
_SORTED_AT_ONCE = 2**26
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),  # of the image; null where it is the shard's own file
        ("offset", pa.int64()),
        ("size", pa.int64()),  # null for a whole file
        ("captions", pa.list_(pa.string())),  # null where they are read from the shard's file
        ("captions_offset", pa.int64()),
        ("captions_size", pa.int64()),
        ("num_captions", pa.int32()),
        ("attributes_offset", pa.int64()),  # null where there are none
        ("attributes_size", pa.int64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class IndexedShard:
    """What the listing of a shard found.

    Attributes:
        samples: Samples with an image.
        with_captions: Those of them that have a caption.
        read: Samples looked at, with an image or without.
        skips: Samples left out: without an image, or of a key seen before in the shard.
        size: Bytes of the shard's file when it was listed.
        time: Its modification time, in nanoseconds; 0 where the file system has none.
    """

    samples: int
    with_captions: int
    read: int
    skips: Skips
    size: int
    time: int


class Part:
    """The samples of one shard.

    Attributes:
        keys: Their keys, n strings.
        num_captions: How many captions each has, int32 [n].
    """

    def __init__(self, table: pa.Table, shard: Shard) -> None:
        self._table, self._shard = table, shard
        self.keys: pa.ChunkedArray = table["key"]
        self.num_captions: npt.NDArray[np.int32] = table["num_captions"].to_numpy()

    def __len__(self) -> int:
        return len(self._table)

    def sample(self, place: int) -> Sample:
        """Return a sample by its place in the shard; captions that are in the shard's file are read from there.

        Raises:
            OSError: when the shard's file is gone or shorter than it was.
        """
        row = self._table.slice(place, 1).to_pylist()[0]
        own = self._shard.file
        captions = row["captions"]
        if captions is None:
            text = Location(own, row["captions_offset"], row["captions_size"]).read() if row["num_captions"] else b""
            captions = self._shard.split(text)
        attributes = None
        if row["attributes_offset"] is not None:
            attributes = Location(own, row["attributes_offset"], row["attributes_size"])
        image = Location(own if row["path"] is None else row["path"], row["offset"], row["size"])
        return Sample(key=row["key"], image=image, captions=tuple(captions), attributes=attributes)


@dataclasses.dataclass(frozen=True)
class DataIndex:
    """The finished index of a data set; picklable, and small beside the data.

    Attributes:
        folder: Where it is.
        shards: The data's shards, in order.
        records: What was found in each.
    """

    folder: Path
    shards: tuple[Shard, ...]
    records: tuple[IndexedShard, ...]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples of each shard, int64 [S]."""
        return np.array([record.samples for record in self.records], dtype=np.int64)

    def part(self, number: int) -> Part:
        """Return the samples of a shard, read from its part or from the parts this process holds."""
        return Part(_read_part(str(_part_path(self.folder, number))), self.shards[number])


def index_identity(kind: str, settings: dict[str, Any], shards: Sequence[Shard]) -> str:
    """Hash what decides the index but the content of the shards: how they are read, their names and files, in order."""
    content = [kind, settings, [(shard.name, shard.file) for shard in shards]]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def write_part(folder: Path, number: int, shard: Shard, samples: Sequence[Sample], read: int, skips: Skips) -> IndexedShard:
    """Write down what the listing of one shard found, whole or not at all.

    Args:
        folder: Folder of the index.
        number: Number of the shard, from 0.
        samples: What `shard.samples(skips)` returned.
        read: Samples looked at.
        skips: Those left out.
    """
    size, time = shard.stamp()
    record = IndexedShard(len(samples), sum(bool(sample.captions) for sample in samples), read, skips, size, time)
    in_file = [sample.captions_at is not None for sample in samples]
    columns: dict[str, Iterable[Any]] = {
        "key": [sample.key for sample in samples],
        "path": [None if sample.image.path == shard.file else sample.image.path for sample in samples],
        "offset": [sample.image.offset for sample in samples],
        "size": [sample.image.size for sample in samples],
        "captions": [None if here else sample.captions for here, sample in zip(in_file, samples, strict=True)],
        "captions_offset": [sample.captions_at and sample.captions_at.offset for sample in samples],
        "captions_size": [sample.captions_at and sample.captions_at.size for sample in samples],
        "num_captions": [len(sample.captions) for sample in samples],
        "attributes_offset": [sample.attributes and sample.attributes.offset for sample in samples],
        "attributes_size": [sample.attributes and sample.attributes.size for sample in samples],
    }
    table = pa.table({name: list(values) for name, values in columns.items()}, schema=_SCHEMA)
    table = table.replace_schema_metadata({b"clipcid": json.dumps(_to_json(record)).encode()})
    with atomic_file(_part_path(folder, number)) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return record


def read_record(folder: Path, number: int, shard: Shard) -> IndexedShard | None:
    """Read what was found in a shard; None when it is not listed yet, or its file has changed since."""
    try:
        with pa.OSFile(str(_part_path(folder, number))) as file:
            record = _from_json(json.loads((pa.ipc.open_file(file).schema.metadata or {})[b"clipcid"]))
    except (OSError, pa.ArrowInvalid, ValueError, KeyError):
        return None
    return record if (record.size, record.time) == shard.stamp() else None


def finish_index(folder: Path, shards: Sequence[Shard], records: Sequence[IndexedShard]) -> DataIndex:
    """Write the table of the shards, once all are listed.

    Raises:
        ClipcidError: when a key occurs in two shards: files of later steps are joined by key.
    """
    index = DataIndex(folder, tuple(shards), tuple(records))
    _refuse_repeated_keys(index)
    rows = [_to_json(record) | {"skips": json.dumps(record.skips.to_json())} for record in records]
    write_parquet(folder / _TABLE, pa.Table.from_pylist(rows))
    return index


def open_index(folder: Path, shards: Sequence[Shard]) -> DataIndex | None:
    """Open a finished index; None where there is none, or a shard has changed since. No shard is opened for it."""
    try:
        rows = pq.read_table(folder / _TABLE).to_pylist()
    except (OSError, pa.ArrowInvalid):
        return None
    records = [_from_json(row | {"skips": json.loads(row["skips"])}) for row in rows]
    stamps = [(record.size, record.time) for record in records]
    if stamps != [shard.stamp() for shard in shards]:
        return None
    return DataIndex(folder, tuple(shards), tuple(records))


def _refuse_repeated_keys(index: DataIndex) -> None:
    """Refuse keys of two shards: their 64-bit hashes are compared, and the keys themselves where hashes agree."""
    ends = np.cumsum(index.sizes)
    if len(index.shards) < 2 or not ends[-1]:
        return
    # On the disk, and sorted a bucket at a time: 8 bytes a key would be 3 GB of memory for 400 million.
    path = index.folder / ".hashes"
    hashes = np.memmap(path, np.uint64, "w+", shape=(int(ends[-1]),))
    try:
        for number, end in enumerate(ends.tolist()):
            hashes[end - index.records[number].samples : end] = hash_keys(index.part(number).keys)
        buckets = -(-len(hashes) // _SORTED_AT_ONCE)
        found: list[npt.NDArray[np.uint64]] = []
        for bucket in range(buckets):
            inside = np.sort(hashes[hashes % np.uint64(buckets) == bucket])
            found.append(np.unique(inside[1:][inside[1:] == inside[:-1]]))
        repeated = np.concatenate(found)
        rows = np.flatnonzero(np.isin(hashes, repeated)) if len(repeated) else np.empty(0, np.int64)
    finally:
        del hashes
        path.unlink(missing_ok=True)
    owners: dict[str, int] = {}
    for row in rows.tolist():
        number = int(np.searchsorted(ends, row, side="right"))
        key = index.part(number).keys[row - int(ends[number]) + index.records[number].samples].as_py()
        owner = owners.setdefault(key, number)
        if owner != number:
            one, other = index.shards[owner].name, index.shards[number].name
            raise ClipcidError(
                f"Key {key!r} occurs in shard {one} and again in shard {other}.",
                "Add --keys shard, which puts the shard's name before each key.",
            )


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.arrow"


@lru_cache(maxsize=PARTS_KEPT)
def _read_part(path: str) -> pa.Table:
    with pa.OSFile(path) as file:
        return pa.ipc.open_file(file).read_all()


def _to_json(record: IndexedShard) -> dict[str, Any]:
    return dataclasses.asdict(record) | {"skips": record.skips.to_json()}


def _from_json(content: dict[str, Any]) -> IndexedShard:
    return IndexedShard(**(content | {"skips": Skips.from_json(content["skips"])}))
