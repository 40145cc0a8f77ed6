"""The index of a data set: where each sample's image and captions are, listed once and read by every later start.

    <work>/index/<options>/<shard>.arrow          the samples of one shard, see `_SCHEMA`
    <work>/index/<options>/shards-<list>.parquet  a row a shard: what was found, stamp and hash of its file, hash of its part

Listing a tar costs 30 to 45 µs a sample, and 400 million samples take hours of it. So each shard is listed once, by any
process, into a file of its own that appears whole; the table is written last. A shard whose file has another size or
modification time than recorded is listed again. A process holds the parts it used last, `PARTS_KEPT` of them.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import create_mapped
from clipcid_cli.formats.atomic import atomic_file, remove_abandoned, write_error, write_parquet
from clipcid_cli.formats.data.remote import is_remote, tells_content
from clipcid_cli.formats.data.samples import Location, Sample, Shard
from clipcid_cli.formats.data.shard_cache import ShardCache, ShardCopy
from clipcid_cli.formats.key_join import hash_keys
from clipcid_cli.formats.reading import read_regular
from clipcid_cli.formats.skips import Skips

PARTS_KEPT = 48
"""Parts that a process holds: two groups of the shuffle's shards and some; 10,000 samples take about 0.7 MB."""

_VERSION = 2
# Hashes sorted together: 128 MiB, and seven times that while they are.
_SORTED_AT_ONCE = 2**24
_READ_AT_ONCE = 2**22
# Of hashes that occur twice, the keys of this many a bucket are compared: nearly always the keys are equal.
_NAMED = 1024
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),  # of the image; null where it is the shard's own file
        ("offset", pa.int64()),
        ("size", pa.int64()),  # −1 for a whole file
        ("captions", pa.list_(pa.string())),  # null where they are read from the shard's file
        ("captions_offset", pa.int64()),
        ("captions_size", pa.int64()),
        ("num_captions", pa.int32()),
        ("attributes_offset", pa.int64()),
        ("attributes_size", pa.int64()),  # −1 where there are none
    ]
)


@dataclasses.dataclass(frozen=True, slots=True)
class IndexedShard:
    """What the listing of a shard found.

    Attributes:
        samples: Samples with an image.
        with_captions: Those of them that have a caption.
        read: Samples looked at, with an image or without.
        skips: Samples left out: without an image, or of a key seen before in the shard.
        stamp: Size and modification time of the shard's file when it was listed, see `Shard.stamp`.
        fingerprint: The shard's fingerprint then.
        digest: Hash of the part's file; in the file itself, of what it holds.
    """

    samples: int
    with_captions: int
    read: int
    skips: Skips
    stamp: tuple[int, int]
    fingerprint: dict[str, Any]
    digest: str = ""


class Part:
    """The samples of one shard.

    Attributes:
        keys: Their keys, n strings.
        num_captions: How many captions each has, int32 [n].
    """

    def __init__(self, table: pa.Table) -> None:
        self.keys, self._paths, self._captions = (table[name] for name in ("key", "path", "captions"))
        self.num_captions: npt.NDArray[np.int32] = table["num_captions"].to_numpy()
        self._image, self._text, self._attributes = (
            (table[f"{prefix}offset"].to_numpy(), table[f"{prefix}size"].to_numpy())
            for prefix in ("", "captions_", "attributes_")
        )

    def __len__(self) -> int:
        return len(self.num_captions)

    def sample(self, place: int, shard: Shard | None, copy: ShardCopy | None = None) -> Sample:
        """Return a sample by its place in the shard; see `DataIndex.sample`.

        Args:
            shard: The shard; None will do where each image is a file of its own.
        """
        own, path = Location("" if shard is None else shard.file, copy=copy), self._paths[place].as_py()
        captions = self._captions[place].as_py()
        if captions is None:
            assert shard is not None, "captions are in the shard's own file"
            captions = shard.split_captions(_part_of(own, self._text, place).read())
        return Sample(
            key=self.keys[place].as_py(),
            image=_part_of(own if path is None else Location(path), self._image, place),
            captions=tuple(captions),
            attributes=_part_of(own, self._attributes, place) if self._attributes[1][place] >= 0 else None,
        )


def _part_of(file: Location, extents: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], place: int) -> Location:
    offset, size = (int(values[place]) for values in extents)
    return Location(file.path, offset, None if size < 0 else size, copy=file.copy)


@dataclasses.dataclass(frozen=True)
class PartSource:
    """Where the part of one shard is, and its hash; small, to be sent to another process.

    Attributes:
        shard: The shard; None where each image is a file of its own.
        copy: Local copy of a shard behind a URL, to read from.
    """

    path: str
    digest: str
    shard: Shard | None
    copy: ShardCopy | None

    def read(self) -> Part:
        """Return the part, read or as this process holds it."""
        return _read_part(self.path, self.digest)


@dataclasses.dataclass(frozen=True)
class SamplePlace:
    """A sample by its place in a shard, to be read in another process."""

    source: PartSource
    place: int

    @property
    def key(self) -> str:
        """The sample's key."""
        return str(self.source.read().keys[self.place])

    def read(self) -> Sample:
        """Return the sample; see `DataIndex.sample`.

        Raises:
            ClipcidError: when the shard's file is gone or shorter than it was.
        """
        try:
            return self.source.read().sample(self.place, self.source.shard, self.source.copy)
        except OSError as error:
            file = self.source.path if self.source.shard is None else self.source.shard.file
            raise ClipcidError(
                f"The captions in {file} cannot be read: {error}.", "Put the file back, then give the command again."
            ) from error


@dataclasses.dataclass(frozen=True)
class DataIndex:
    """The finished index of a data set; picklable, and small beside the data.

    Attributes:
        folder: Where it is.
        shards: The data's shards, in order.
        records: What was found in each.
        cache: Where shards behind URLs are copied to, for reading many of their samples; None reads a part at a time.
    """

    folder: Path
    shards: tuple[Shard, ...]
    records: tuple[IndexedShard, ...]
    cache: ShardCache | None = None

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples of each shard, int64 [S]."""
        return np.array([record.samples for record in self.records], dtype=np.int64)

    def part(self, number: int) -> Part:
        """Return the samples of a shard, read from its part or from the parts this process holds."""
        return _read_part(str(_part_path(self.folder, self.shards[number])), self.records[number].digest)

    def sample(self, number: int, place: int) -> Sample:
        """Return a sample by its shard and its place there; captions that are in the shard's file are read from it.

        Raises:
            OSError: when the shard's file is gone or shorter than it was.
        """
        return self.part(number).sample(place, self.shards[number], self._copy(number))

    def source(self, number: int) -> PartSource:
        """Return where the part of a shard is."""
        shard, digest = self.shards[number], self.records[number].digest
        return PartSource(
            str(_part_path(self.folder, shard)), digest, shard if shard.file else None, self._copy(number)
        )

    def fetch_ahead(self, numbers: Sequence[int]) -> None:
        """Copy shards to the cache in the background, in order; see `ShardCache.fetch_ahead`."""
        copies = [copy for copy in map(self._copy, numbers) if copy is not None]
        if self.cache is not None and copies:
            self.cache.fetch_ahead(copies)

    def _copy(self, number: int) -> ShardCopy | None:
        path = self.shards[number].file
        if self.cache is None or not is_remote(path):
            return None
        listed, digest = self.records[number].fingerprint, self.records[number].digest
        return ShardCopy(self.cache, path, listed["hash"], "" if tells_content(listed) else digest)


def index_identity(kind: str, settings: dict[str, Any]) -> str:
    """Hash how shards are read, which decides the folder of their index."""
    return _identity([_VERSION, kind, settings])


def write_part(
    folder: Path, shard: Shard, stamp: tuple[int, int], samples: Sequence[Sample], read: int, skips: Skips
) -> None:
    """Write down what the listing of one shard found, whole or not at all.

    Args:
        stamp: The shard's stamp before it was listed, so that a change meanwhile is noticed.
        samples: What `shard.samples(skips)` returned.
    """
    captioned = sum(bool(sample.captions) for sample in samples)
    record = IndexedShard(len(samples), captioned, read, skips, stamp, shard.fingerprint())
    columns: dict[str, Iterable[Any]] = {
        "key": (sample.key for sample in samples),
        "path": (None if sample.image.path == shard.file else sample.image.path for sample in samples),
        "captions": (None if sample.captions_at is not None else sample.captions for sample in samples),
        "num_captions": (len(sample.captions) for sample in samples),
    }
    nowhere = Location("", 0, -1)
    for prefix, locations in (
        ("", (sample.image for sample in samples)),
        ("captions_", (sample.captions_at or nowhere for sample in samples)),
        ("attributes_", (sample.attributes or nowhere for sample in samples)),
    ):
        found = [(location.offset, -1 if location.size is None else location.size) for location in locations]
        columns |= {f"{prefix}offset": (offset for offset, _ in found), f"{prefix}size": (size for _, size in found)}
    try:
        table = pa.table({name: list(values) for name, values in columns.items()}, schema=_SCHEMA)
    except UnicodeEncodeError as error:
        name = error.object[:100].encode("utf-8", "backslashreplace").decode()
        problem = f"{shard.source}: the name of a file is not UTF-8: {name}."
        raise ClipcidError(problem, "Rename the file; keys are text.") from error
    record = dataclasses.replace(record, digest=_hash_content(record, table))
    table = table.replace_schema_metadata({b"clipcid": json.dumps(_to_json(record)).encode()})
    path = _part_path(folder, shard)  # also written by a worker process that outlives its run for a moment
    with atomic_file(path, shared=True) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_record(folder: Path, shard: Shard) -> IndexedShard | None:
    """Read what was found in a shard; None when it is not listed yet, or its file has changed since."""
    try:
        content = read_regular(_part_path(folder, shard))
        table = pa.ipc.open_file(content).read_all()
        written = _from_json(json.loads(table.schema.metadata[b"clipcid"]))
        whole = written.digest == _hash_content(written, table)
    except Exception:  # a damaged part is listed again, as an edited one is
        return None
    return dataclasses.replace(written, digest=_digest(content)) if whole and written.stamp == shard.stamp() else None


def finish_index(folder: Path, shards: Sequence[Shard], records: Sequence[IndexedShard]) -> DataIndex:
    """Write the table of the shards, once all are listed.

    Raises:
        ClipcidError: when a key occurs in two shards: files of later steps are joined by key.
    """
    index = DataIndex(folder, tuple(shards), tuple(records))
    _refuse_repeated_keys(index)
    write_parquet(_table_path(folder, shards), pa.table({"shard": [json.dumps(_to_json(each)) for each in records]}))
    return index


def open_index(folder: Path, shards: Sequence[Shard]) -> DataIndex | None:
    """Open a finished index; None where there is none, or a shard has changed since. No shard is opened for it."""
    try:
        rows = pq.read_table(_table_path(folder, shards))["shard"].to_pylist()
        records = [_from_json(json.loads(row)) for row in rows]
    except Exception:  # a damaged table is made again
        return None
    same = [record.stamp for record in records] == [shard.stamp() for shard in shards]
    return DataIndex(folder, tuple(shards), tuple(records)) if same else None


@contextmanager
def lock_index(folder: Path) -> Iterator[None]:
    """Hold an index while files are added to it, and remove what killed runs left. A second run waits for the first one's.

    Raises:
        ClipcidError: when the folder cannot be written to.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The kernel drops the lock when the process ends, however it ends.
            fcntl.flock(stack.enter_context((folder / ".lock").open("w")), fcntl.LOCK_EX)
        except OSError as error:
            raise write_error(folder, error) from error
        remove_abandoned(folder.glob(".*.partial"))
        yield


def _refuse_repeated_keys(index: DataIndex) -> None:
    """Refuse keys of two shards: their 64-bit hashes are compared, and the keys themselves where hashes agree."""
    ends = np.cumsum(index.sizes)
    if len(index.shards) < 2 or not ends[-1]:
        return
    path = index.folder / ".hashes"  # sorted a bucket at a time: 8 bytes a key would be 3 GB of memory for 400 million
    hashes = create_mapped(path, np.dtype(np.uint64), (int(ends[-1]),))
    try:
        for number, end in enumerate(ends.tolist()):
            hashes[end - index.records[number].samples : end] = hash_keys(index.part(number).keys)
        slices = [slice(first, first + _READ_AT_ONCE) for first in range(0, len(hashes), _READ_AT_ONCE)]
        buckets = np.uint64(-(-len(hashes) // _SORTED_AT_ONCE))
        found: list[npt.NDArray[np.uint64]] = []
        for bucket in range(int(buckets)):
            inside = np.concatenate([part[part % buckets == bucket] for part in map(hashes.__getitem__, slices)])
            inside.sort()
            found.append(np.unique(inside[1:][inside[1:] == inside[:-1]])[:_NAMED])
        repeated = np.concatenate(found)
        rows = np.concatenate([part.start + np.flatnonzero(np.isin(hashes[part], repeated)) for part in slices])
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


def _part_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{_identity([shard.name, shard.source])}.arrow"


def _table_path(folder: Path, shards: Sequence[Shard]) -> Path:
    return folder / f"shards-{_identity([(shard.name, shard.source) for shard in shards])}.parquet"


def _identity(content: list[Any]) -> str:
    return _digest(json.dumps(content, sort_keys=True).encode("utf-8", "surrogateescape"))[:16]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _hash_content(record: IndexedShard, table: pa.Table) -> str:
    """Hash what a part holds, but for the hash itself."""
    told = json.dumps(_to_json(dataclasses.replace(record, digest="")), sort_keys=True)
    return _digest(b"".join([told.encode(), *(batch.serialize() for batch in table.to_batches())]))


@lru_cache(maxsize=PARTS_KEPT)
def _read_part(path: str, digest: str) -> Part:
    """Read a part, or give the one held; an edited part has another digest, as has that of another version of the shard."""
    with suppress(OSError, pa.ArrowInvalid):
        content = read_regular(path)
        if _digest(content) == digest:
            return Part(pa.ipc.open_file(content).read_all())
    raise ClipcidError(
        f"{path} is missing, edited, damaged, or of another version of its shard.",
        f"Remove {Path(path).parent}/shards-*.parquet and give the command again: what is damaged is listed anew.",
    )


def _to_json(record: IndexedShard) -> dict[str, Any]:
    return dataclasses.asdict(record) | {"skips": record.skips.to_json()}


def _from_json(content: dict[str, Any]) -> IndexedShard:
    return IndexedShard(**(content | {"skips": Skips.from_json(content["skips"]), "stamp": tuple(content["stamp"])}))
