"""The index of a data set: where each sample's image and captions are, listed once and read by every later start.

    <work>/index/<options>/<shard>.arrow          the samples of one shard, see `_SCHEMA`
    <work>/index/<options>/shards-<list>.parquet  a row a shard: what was found, stamp and hash

Listing 400 million samples in tars takes hours. So each shard is listed once, by any process, into a file of its own that
appears whole; the table is written last. A shard is listed again where its file has another size, time or inode than when
it was listed. A process holds the parts it used last, `_PARTS_KEPT` of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.files import atomic_file, lock, read_regular, write_error, write_parquet
from clipcid_cli.formats.fingerprint import FileRecord, hash_json
from clipcid_cli.formats.skips import Skips
from clipcid_cli.shown import redact

if TYPE_CHECKING:
    from clipcid_cli.formats.data.cells import Origin
    from clipcid_cli.formats.data.shard_cache import ShardCache, ShardCopy

# Parts that a process holds: two groups of the shuffle's shards and some; 10,000 samples take about 0.7 MB.
_PARTS_KEPT = 48

_VERSION = 7
_LOCATION = pa.struct(
    [
        ("path", pa.string()),  # null where it is the shard's own file
        ("offset", pa.int64()),
        ("size", pa.int64()),  # null for a whole file
    ]
)
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", _LOCATION),
        ("captions", pa.list_(pa.string())),  # null where they are read from the shard's file
        ("captions_at", pa.list_(_LOCATION)),  # by each of the shard's keys of captions, null where it has none
        ("num_captions", pa.int32()),
        ("attributes", _LOCATION),
    ]
)
_RECORD = b"clipcid"  # of the part's schema
_SKIPPED = b"skipped"  # samples that were left out, each with its key, shard and reason


class RepeatedKeyError(ClipcidError):
    """Two shards have one key."""

    def __init__(self, key: str, one: str, other: str) -> None:
        super().__init__(
            f"Key {key!r} occurs in shard {one} and again in shard {other}.",
            "Add --keys shard, which puts the shard's name before each key.",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class IndexedShard:
    """What the listing of a shard found."""

    samples: int  # with an image
    with_captions: int
    with_labels: int
    read: int  # with an image or without
    skips: Skips  # without an image, or of a key seen before in the shard
    stamp: tuple[int, ...]  # of the shard when it was listed, as its fingerprint
    fingerprint: FileRecord
    digest: str = ""  # of all this and of what the part holds


@dataclasses.dataclass(frozen=True)
class Part:
    """The samples of one shard, to be sent to another process: read where they are needed, and held there."""

    path: str
    digest: str
    shard: Shard | None  # None where each image is a file of its own
    copy: ShardCopy | None  # of a shard that is streamed, to read from
    max_sample_bytes: int
    origin: Origin | None  # what names the images where each is a file of its own

    @property
    def table(self) -> pa.Table:
        """The samples, see `_SCHEMA`."""
        return _read_part(self.path, self.digest)[0]

    @property
    def skipped(self) -> list[tuple[str, str, str]]:
        """Key, shard and reason of each sample that was left out."""
        return _read_part(self.path, self.digest)[1]

    @property
    def keys(self) -> pa.ChunkedArray:
        """Their keys, n strings."""
        return self.table["key"]

    @property
    def num_captions(self) -> npt.NDArray[np.int32]:
        """How many captions each has, int32 [n]."""
        counts: npt.NDArray[np.int32] = self.table["num_captions"].to_numpy()
        return counts

    def __len__(self) -> int:
        return len(self.table)

    def sample(self, place: int, *, captions: bool = True) -> Sample:
        """Return a sample by its place, with its captions or without; those in the shard's file are read from it."""
        row = self.table.slice(place, 1).to_pylist()[0]
        texts = row["captions"] if captions else ()
        if texts is None:
            assert self.shard is not None, "captions are in the shard's own file"
            texts = self.shard.read_captions([text and self._locate(text) for text in row["captions_at"]])
        return Sample(
            key=row["key"],
            image=self._locate(row["image"]),
            captions=tuple(texts),
            attributes=None if row["attributes"] is None else self._locate(row["attributes"]),
        )

    def _locate(self, place: dict[str, Any]) -> ByteRange:
        if self.shard is None:
            return ByteRange(**place, max_bytes=self.max_sample_bytes, origin=self.origin)
        return ByteRange(
            self.shard.file,
            place["offset"],
            place["size"],
            copy=self.copy,
            column=self.shard.image_column,
            max_bytes=self.max_sample_bytes,
        )


@dataclasses.dataclass(frozen=True)
class SampleRef:
    """A sample by its place in a shard, to be read in another process."""

    part: Part
    place: int

    @property
    def key(self) -> str:
        return str(self.part.keys[self.place])

    def read(self) -> Sample:
        return self.part.sample(self.place)


@dataclasses.dataclass(frozen=True)
class DataIndex:
    """The finished index of a data set; picklable."""

    folder: Path
    shards: tuple[Shard, ...]
    records: tuple[IndexedShard, ...]
    cache: ShardCache | None = None  # where streamed shards are copied to; None reads one sample at a time

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples of each shard, int64 [S]."""
        return np.array([record.samples for record in self.records], dtype=np.int64)

    def part(self, shard_index: int) -> Part:
        shard = self.shards[shard_index]
        path = str(_part_path(self.folder, shard))
        digest = self.records[shard_index].digest
        in_file = shard if shard.file else None
        return Part(path, digest, in_file, self.copy(shard_index), shard.max_sample_bytes, shard.origin)

    def skips(self, shard_index: int) -> Skips:
        """Return what was left out of a shard, with the list of it."""
        counted = self.records[shard_index].skips
        return dataclasses.replace(counted, listed=[*self.part(shard_index).skipped]) if counted.total else counted

    def fetch_ahead(self, numbers: Sequence[int]) -> None:
        """Copy shards to the cache in the background, in order; see `ShardCache.fetch_ahead`."""
        if self.cache is not None:
            self.cache.fetch_ahead(filter(None, map(self.copy, numbers)))

    def copy(self, shard_index: int) -> ShardCopy | None:
        """Return the local copy of a shard, fetched or not; None of a shard that is read where it is."""
        shard = self.shards[shard_index]
        if self.cache is None or not shard.is_streamed:
            return None
        record = self.records[shard_index]
        # With its secrets, to be fetched; and an index may be someone else's: what is fetched is what the data names.
        described = msgspec.structs.replace(record.fingerprint, path=shard.source)
        return self.cache.copy(described, record.digest, shard.image_column)


def index_folder(root: Path, kind: str, settings: dict[str, Any]) -> Path:
    """Return the folder of an index, which depends on how shards are read."""
    return root / hash_json([_VERSION, kind, settings])


def write_part(folder: Path, shard: Shard, stamp: tuple[int, ...], samples: Sequence[Sample], skips: Skips) -> None:
    """Write down what the listing of a shard found; `stamp` is from before it, so that a change meanwhile is noticed."""
    record = IndexedShard(
        samples=len(samples),
        with_captions=sum(bool(sample.captions) for sample in samples),
        with_labels=sum(sample.label is not None for sample in samples),
        read=len(samples) + skips.total,
        skips=skips.counted(),
        stamp=stamp,
        fingerprint=shard.fingerprint(),
    )
    try:
        table = pa.Table.from_pylist([_to_row(sample, shard.file) for sample in samples], _SCHEMA)
    except UnicodeEncodeError as error:
        name = error.object[:100].encode("utf-8", "backslashreplace").decode()
        problem = f"{shard.source}: the name of a file is not UTF-8: {name}."
        raise ClipcidError(problem, "Rename the file; keys are text.") from error
    skipped = json.dumps(shard.locate(skips).listed)
    record = dataclasses.replace(record, digest=_hash(record, table, skipped))
    table = table.replace_schema_metadata({_RECORD: _to_json(record), _SKIPPED: skipped})
    # Shared: also written by a worker process that outlives its run for a moment.
    with atomic_file(_part_path(folder, shard), shared=True) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _to_row(sample: Sample, file: str) -> dict[str, Any]:
    def describe(place: ByteRange | None) -> dict[str, Any] | None:
        if place is None:
            return None
        return {"path": None if place.path == file else place.path, "offset": place.offset, "size": place.size}

    return {
        "key": sample.key,
        "image": describe(sample.image),
        "captions": None if sample.captions_at else sample.captions,
        "captions_at": [*map(describe, sample.captions_at)],
        "num_captions": len(sample.captions),
        "attributes": describe(sample.attributes),
    }


def read_record(folder: Path, shard: Shard) -> IndexedShard | None:
    """Read what was found in a shard; None when it is not listed yet, or its file has changed since."""
    try:
        record, _, _ = _load(_part_path(folder, shard))
    except Exception:  # a damaged part is listed again, as an edited one is
        return None
    return record if record.stamp == shard.stamp() else None


def finish_index(folder: Path, shards: Sequence[Shard], records: Sequence[IndexedShard]) -> DataIndex:
    """Write the table of the shards, once all are listed; files of later steps are joined by key, so none may repeat."""
    index = DataIndex(folder, tuple(shards), tuple(records))
    if len(shards) > 1:  # within a shard all keys differ
        from clipcid_cli.formats.join import find_repeat

        repeat = find_repeat(lambda: (index.part(shard_index).keys for shard_index in range(len(shards))), folder)
        if repeat is not None:
            rows = (repeat.first, repeat.second)
            one, other = (shards[at].name for at in np.searchsorted(np.cumsum(index.sizes), rows, side="right"))
            raise RepeatedKeyError(repeat.key, one, other)
    write_parquet(_table_path(folder, shards), pa.table({"shard": list(map(_to_json, records))}))
    return index


def open_index(folder: Path, shards: Sequence[Shard]) -> DataIndex | None:
    """Open a finished index, without opening a shard; None where the index is missing or a shard has changed since."""
    try:
        rows = pq.read_table(_table_path(folder, shards))["shard"].to_pylist()
        records = tuple(map(_from_json, rows))
    except Exception:  # a damaged table is made again
        return None
    is_current = [record.stamp for record in records] == [shard.stamp() for shard in shards]
    return DataIndex(folder, tuple(shards), records) if is_current else None


@contextmanager
def lock_index(folder: Path) -> Iterator[None]:
    """Hold an index while files are added to it. A second run waits for the first."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder / ".lock"))
        except OSError as error:
            raise write_error(folder, error) from error
        yield


def _part_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{hash_json([shard.name, redact(shard.source)])}.arrow"


def _table_path(folder: Path, shards: Sequence[Shard]) -> Path:
    return folder / f"shards-{hash_json([(shard.name, redact(shard.source)) for shard in shards])}.parquet"


def _to_json(record: IndexedShard) -> str:
    return json.dumps(msgspec.to_builtins(record), sort_keys=True)  # not by msgspec: paths need not be UTF-8


def _from_json(text: str | bytes) -> IndexedShard:
    return msgspec.convert(json.loads(text), IndexedShard)


def _hash(record: IndexedShard, table: pa.Table, skipped: str) -> str:
    digest = hashlib.blake2b(_to_json(dataclasses.replace(record, digest="")).encode(), digest_size=16)
    digest.update(skipped.encode())
    for batch in table.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()


def _load(path: Path) -> tuple[IndexedShard, pa.Table, list[tuple[str, str, str]]]:
    """Read a part, and what was left out; some error where it is missing, or not what was written."""
    table = pa.ipc.open_file(read_regular(path)).read_all()
    record = _from_json(table.schema.metadata[_RECORD])
    skipped = table.schema.metadata[_SKIPPED].decode()
    table = table.replace_schema_metadata()
    if _hash(record, table, skipped) != record.digest:
        raise ValueError(f"{path} is damaged")
    return record, table, [(key, shard, reason) for key, shard, reason in json.loads(skipped)]


@lru_cache(maxsize=_PARTS_KEPT)
def _read_part(path: str, digest: str) -> tuple[pa.Table, list[tuple[str, str, str]]]:
    """Read a part, or return the one held in memory; a part that was edited or is of another version has another digest."""
    try:
        record, table, skipped = _load(Path(path))
        if record.digest != digest:
            raise ValueError(f"{path} is of another version")
    except Exception as error:
        raise ClipcidError(
            f"{path} is missing, edited, damaged, or of another version of its shard.",
            f"Remove {Path(path).parent}/shards-*.parquet and run the same command again: it lists the data anew.",
        ) from error
    return table, skipped
