"""The index of a data set: where each sample's image and captions are, listed once and read by every later start.

    <work>/index/<options>/<shard>.arrow          the samples of one shard, see `_SCHEMA`
    <work>/index/<options>/shards-<list>.parquet  a row a shard: what was found, stamp and hash

Listing 400 million samples in tars takes hours. So each shard is listed once, by any process, into a file of its own that
appears whole; the table is written last. A shard whose file has another size or modification time than recorded is listed
again. A process holds the parts it used last, `PARTS_KEPT` of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import atomic_file, write_error, write_parquet
from clipcid_cli.formats.data.remote import is_remote, tells_content
from clipcid_cli.formats.data.samples import Location, Sample
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.data.shard_cache import ShardCache, ShardCopy
from clipcid_cli.formats.data.tars import split_captions
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.join import find_repeat
from clipcid_cli.formats.lock import lock
from clipcid_cli.formats.reading import read_regular
from clipcid_cli.formats.skips import Skips

PARTS_KEPT = 48
"""Parts that a process holds: two groups of the shuffle's shards and some; 10,000 samples take about 0.7 MB."""

_VERSION = 3
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
        ("captions_at", _LOCATION),
        ("num_captions", pa.int32()),
        ("attributes", _LOCATION),
    ]
)
_RECORD = b"clipcid"  # of the part's schema


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
        digest: Hash of all this and of what the part holds.
    """

    samples: int
    with_captions: int
    read: int
    skips: Skips
    stamp: tuple[int, int]
    fingerprint: FileRecord
    digest: str = ""


class Part:
    """The samples of one shard.

    Attributes:
        table: See `_SCHEMA`.
        keys: Their keys, n strings.
        num_captions: How many captions each has, int32 [n].
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.keys: pa.ChunkedArray = table["key"]
        self.num_captions: npt.NDArray[np.int32] = table["num_captions"].to_numpy()

    def __len__(self) -> int:
        return len(self.table)


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

    def sample(self, place: int) -> Sample:
        """Return a sample by its place in the shard; captions that are in the shard's file are read from it.

        Raises:
            OSError: when the shard's file is gone or shorter than it was.
        """
        table = self.read().table
        key, image, captions, captions_at, attributes = (
            table[name][place].as_py() for name in ("key", "image", "captions", "captions_at", "attributes")
        )
        if captions is None:
            assert self.shard is not None, "captions are in the shard's own file"
            text = self._locate(captions_at).read()
            captions = split_captions(text, a_line_each=self.shard.caption_lines)
        return Sample(
            key=key,
            image=self._locate(image),
            captions=tuple(captions),
            attributes=None if attributes is None else self._locate(attributes),
        )

    def _locate(self, found: dict[str, Any]) -> Location:
        if found["path"] is not None or self.shard is None:
            return Location(**found)
        return Location(self.shard.file, found["offset"], found["size"], copy=self.copy)


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
        """Return the sample."""
        try:
            return self.source.sample(self.place)
        except OSError as error:
            file = self.source.path if self.source.shard is None else self.source.shard.file
            raise ClipcidError(
                f"The captions in {file} cannot be read: {error}.", "Put the file back, then give the command again."
            ) from error


@dataclasses.dataclass(frozen=True)
class DataIndex:
    """The finished index of a data set; picklable, and small beside the data.

    Attributes:
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

    def source(self, number: int) -> PartSource:
        """Return where the part of a shard is."""
        shard = self.shards[number]
        path = str(_part_path(self.folder, shard))
        return PartSource(path, self.records[number].digest, shard if shard.file else None, self._copy(number))

    def part(self, number: int) -> Part:
        """Return the samples of a shard, read from its part or from the parts this process holds."""
        return self.source(number).read()

    def sample(self, number: int, place: int) -> Sample:
        """Return a sample by its shard and its place there; see `PartSource.sample`."""
        return self.source(number).sample(place)

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
        return ShardCopy(self.cache, path, listed.hash, "" if tells_content(listed) else digest)


def index_identity(kind: str, settings: dict[str, Any]) -> str:
    """Hash how shards are read, which decides the folder of their index."""
    return _identity([_VERSION, kind, settings])


def write_part(folder: Path, shard: Shard, stamp: tuple[int, int], samples: Sequence[Sample], skips: Skips) -> None:
    """Write down what the listing of one shard found, whole or not at all.

    Args:
        stamp: The shard's stamp before it was listed, so that a change meanwhile is noticed.
        samples: What `shard.samples(skips)` returned.
    """
    captioned, read = sum(bool(sample.captions) for sample in samples), len(samples) + skips.total
    record = IndexedShard(len(samples), captioned, read, skips, stamp, shard.fingerprint())
    try:
        table = pa.Table.from_pylist([_to_row(sample, shard.file) for sample in samples], _SCHEMA)
    except UnicodeEncodeError as error:
        name = error.object[:100].encode("utf-8", "backslashreplace").decode()
        problem = f"{shard.source}: the name of a file is not UTF-8: {name}."
        raise ClipcidError(problem, "Rename the file; keys are text.") from error
    record = dataclasses.replace(record, digest=_hash(record, table))
    table = table.replace_schema_metadata({_RECORD: _to_json(record)})
    path = _part_path(folder, shard)  # also written by a worker process that outlives its run for a moment
    with atomic_file(path, shared=True) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _to_row(sample: Sample, file: str) -> dict[str, Any]:
    def describe(location: Location | None) -> dict[str, Any] | None:
        if location is None:
            return None
        path = None if location.path == file else location.path
        return {"path": path, "offset": location.offset, "size": location.size}

    return {
        "key": sample.key,
        "image": describe(sample.image),
        "captions": None if sample.captions_at is not None else sample.captions,
        "captions_at": describe(sample.captions_at),
        "num_captions": len(sample.captions),
        "attributes": describe(sample.attributes),
    }


def read_record(folder: Path, shard: Shard) -> IndexedShard | None:
    """Read what was found in a shard; None when it is not listed yet, or its file has changed since."""
    try:
        record, _ = _load(_part_path(folder, shard))
    except Exception:  # a damaged part is listed again, as an edited one is
        return None
    return record if record.stamp == shard.stamp() else None


def finish_index(folder: Path, shards: Sequence[Shard], records: Sequence[IndexedShard]) -> DataIndex:
    """Write the table of the shards, once all are listed; files of later steps are joined by key, so none may repeat."""
    index = DataIndex(folder, tuple(shards), tuple(records))
    _refuse_repeated_keys(index)
    write_parquet(_table_path(folder, shards), pa.table({"shard": list(map(_to_json, records))}))
    return index


def open_index(folder: Path, shards: Sequence[Shard]) -> DataIndex | None:
    """Open a finished index; None where there is none, or a shard has changed since. No shard is opened for it."""
    try:
        rows = pq.read_table(_table_path(folder, shards))["shard"].to_pylist()
        records = tuple(map(_from_json, rows))
    except Exception:  # a damaged table is made again
        return None
    same = [record.stamp for record in records] == [shard.stamp() for shard in shards]
    return DataIndex(folder, tuple(shards), records) if same else None


@contextmanager
def lock_index(folder: Path) -> Iterator[None]:
    """Hold an index while files are added to it, and remove what killed runs left. A second run waits for the first."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(folder / ".lock"))
        except OSError as error:
            raise write_error(folder, error) from error
        for left in folder.glob(".matched-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _refuse_repeated_keys(index: DataIndex) -> None:
    """Refuse keys of two shards; within a shard all differ."""
    if len(index.shards) < 2:
        return
    repeat = find_repeat(lambda: (index.part(number).keys for number in range(len(index.shards))), index.folder)
    if repeat is not None:
        ends, rows = np.cumsum(index.sizes), (repeat.first, repeat.second)
        one, other = (index.shards[int(np.searchsorted(ends, row, side="right"))].name for row in rows)
        raise repeated_key(repeat.key, one, other)


def repeated_key(key: str, one: str, other: str) -> ClipcidError:
    """Return the error for a key that two shards have."""
    return ClipcidError(
        f"Key {key!r} occurs in shard {one} and again in shard {other}.",
        "Add --keys shard, which puts the shard's name before each key.",
    )


def _part_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{_identity([shard.name, shard.source])}.arrow"


def _table_path(folder: Path, shards: Sequence[Shard]) -> Path:
    return folder / f"shards-{_identity([(shard.name, shard.source) for shard in shards])}.parquet"


def _identity(content: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _to_json(record: IndexedShard) -> str:
    return json.dumps(msgspec.to_builtins(record), sort_keys=True)  # not by msgspec: paths need not be UTF-8


def _from_json(text: str | bytes) -> IndexedShard:
    return msgspec.convert(json.loads(text), IndexedShard)


def _hash(record: IndexedShard, table: pa.Table) -> str:
    digest = hashlib.blake2b(_to_json(dataclasses.replace(record, digest="")).encode(), digest_size=16)
    for batch in table.to_batches():
        digest.update(batch.serialize())
    return digest.hexdigest()


def _load(path: Path) -> tuple[IndexedShard, pa.Table]:
    """Read a part; some error where it is missing, or not what was written."""
    table = pa.ipc.open_file(read_regular(path)).read_all()
    record = _from_json(table.schema.metadata[_RECORD])
    table = table.replace_schema_metadata()
    if _hash(record, table) != record.digest:
        raise ValueError(f"{path} is damaged")
    return record, table


@lru_cache(maxsize=PARTS_KEPT)
def _read_part(path: str, digest: str) -> Part:
    """Read a part, or give the one held; an edited part has another digest, as has that of another version of the shard."""
    try:
        record, table = _load(Path(path))
        if record.digest != digest:
            raise ValueError(f"{path} is of another version")
    except Exception as error:
        raise ClipcidError(
            f"{path} is missing, edited, damaged, or of another version of its shard.",
            f"Remove {Path(path).parent}/shards-*.parquet and give the command again: what is damaged is listed anew.",
        ) from error
    return Part(table)
