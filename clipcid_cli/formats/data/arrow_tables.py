"""Tables that the library `datasets` caches or saves, Arrow streams: images with captions, or candidate images of cues.

Their images are in the table, or files of the cache that it names.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.captions import clean_captions
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.data.shard_files import name_shards
from clipcid_cli.formats.files import describe
from clipcid_cli.formats.skips import Skips

_CAPTIONED = ("image", "caption")
_CUED = ("cue", "candidates", "candidate_images", "associations")
# A record batch: its table's fields by their indexes in Arrow's Message.fbs.
_HEADER, _COMPRESSION = 2, 3
_MOST_OF_ROW = 2**30  # bytes


def find_tables(place: Path) -> list[Path]:
    """Return the tables in a folder, but for those that `datasets` made of them."""
    return sorted(path for path in place.rglob("*.arrow") if not path.name.startswith("cache-"))


def open_captioned(place: Path, root: Path, max_sample_bytes: int) -> Dataset:
    """Open a table of images, each with its captions; images that are files must lie below `root`."""
    return _open(place, root, _CAPTIONED, max_sample_bytes)


def open_cued(place: Path, root: Path, max_sample_bytes: int) -> tuple[Dataset, list[Cue]]:
    """Open tables of cues with candidate images, a sample each, whose label is the index of the cue; return the cues."""
    dataset = _open(place, root, _CUED, max_sample_bytes)
    cues = list[Cue]()
    shards = list[ArrowShard]()
    for shard in dataset.shards:
        assert isinstance(shard, ArrowShard)
        shards.append(dataclasses.replace(shard, first=len(cues)))
        cues += [
            Cue(record["cue"], len(record["candidates"] or [])) for record in _read_records(shard.source, _CUED[:2])
        ]
    if not cues or not all(isinstance(cue.text, str) and cue.text for cue in cues):
        raise ClipcidError(f"{place}: a row has no cue.", "Download the data set again.")
    return dataclasses.replace(dataset, shards=tuple(shards)), cues


def _open(place: Path, root: Path, columns: tuple[str, ...], max_sample_bytes: int) -> Dataset:
    files = [str(path) for path in find_tables(place)]
    shards = [
        ArrowShard(
            name,
            file,
            prefix_keys=len(files) > 1,  # numbers of rows repeat in other files
            max_sample_bytes=max_sample_bytes,
            columns=columns,
            root=os.path.realpath(root),
        )
        for name, file in zip(name_shards(files), files, strict=True)
    ]
    return Dataset(str(place), "arrow", tuple(shards))


class Cue(NamedTuple):
    """A cue, and how many images are its candidates."""

    text: str
    candidates: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrowShard(Shard):
    """A table on this disk."""

    columns: tuple[str, ...]
    root: str  # the folder that images must lie below, without links
    first: int = 0  # the number of its first row among those of all tables

    @property
    def is_streamed(self) -> bool:
        return True

    def _read_own(self, skips: Skips) -> Iterator[Sample]:
        for row, record in enumerate(_read_records(self.source, self.columns)):
            yield from self._make_samples(row, record, skips)

    def _make_samples(self, row: int, record: dict[str, Any], skips: Skips) -> Iterator[Sample]:
        if self.columns == _CAPTIONED:
            image = self._place(record["image"])
            if image is None:
                skips.add("no_image", f"{self.name}/{row}")
            else:
                yield Sample(str(row), image, clean_captions(record["caption"], skips))
            return
        names, images = record["candidates"] or [], record["candidate_images"] or []
        associated = set(record["associations"] or [])
        for index, (name, value) in enumerate(zip(names, images, strict=False)):
            key = f"{row}/{index}"
            image = self._place(value)
            if image is None:
                skips.add("no_image", f"{self.name}/{key}")
                continue
            cue = self.first + row
            yield Sample(key, image, label=cue, labels=(cue,) if name in associated else ())

    def _place(self, value: dict[str, Any] | None) -> ByteRange | None:
        """Return where an image is; None where the table holds none, or names a file outside the folder."""
        if value is None:
            return None
        content, path = value.get("bytes"), value.get("path")
        if content is not None:
            return ByteRange(self.source, size=len(content), data=content, max_bytes=self.max_sample_bytes)
        if not isinstance(path, str):
            return None
        # The table may be a stranger's, and must not have other files of this disk read.
        try:
            resolved = os.path.realpath(path)
        except ValueError:  # a name that is none
            return None
        if os.path.commonpath([resolved, self.root]) != self.root:
            return None
        return ByteRange(resolved, max_bytes=self.max_sample_bytes)


def _read_records(path: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, a few at a time."""
    try:
        with pa.memory_map(path) as file:
            messages = pa.ipc.MessageReader.open_stream(file)
            schema = pa.ipc.read_schema(messages.read_next_message())
            if missing := [name for name in columns if name not in schema.names]:
                raise ValueError(f"it has no column {missing[0]!r}")
            for name in columns:
                if not _TYPES[name](schema.field(name).type):
                    raise ValueError(f"its column {name!r} is of {schema.field(name).type}")
            for message in messages:
                # Compressed, a table could expand beyond all memory; as it is, it is as large as the file.
                if _is_compressed(message.metadata.to_pybytes()):
                    raise ValueError("it is compressed")
                batch = pa.ipc.read_record_batch(message, schema).select(list(columns))
                batch.validate(full=True)  # offsets of a damaged file may lead outside it
                for at in range(len(batch)):
                    row = batch.slice(at, 1)
                    # It becomes Python's bytes, a second time in memory.
                    if row.nbytes > _MOST_OF_ROW:
                        raise ValueError(f"a row has {row.nbytes:,} bytes")
                    yield from row.to_pylist()
    except (pa.ArrowException, OSError, ValueError, struct.error, StopIteration) as error:
        raise ClipcidError(
            f"{path} cannot be read as a table of the library datasets: {describe(error)}.",
            "Download the data set again.",
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or {field.name for field in kind} != {"bytes", "path"}:
        return False
    content = kind.field("bytes").type
    return bool(pa.types.is_binary(content) or pa.types.is_large_binary(content)) and _is_text(kind.field("path").type)


def _is_list(kind: pa.DataType, of: Callable[[pa.DataType], bool]) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and of(kind.value_type)


# Each value of these takes bytes of the file: millions of nulls, say, take none, and would fill the memory.
_TYPES: dict[str, Callable[[pa.DataType], bool]] = {
    "image": _is_image,
    "caption": lambda kind: _is_text(kind) or _is_list(kind, _is_text),
    "cue": _is_text,
    "candidates": lambda kind: _is_list(kind, _is_text),
    "candidate_images": lambda kind: _is_list(kind, _is_image),
    "associations": lambda kind: _is_list(kind, _is_text),
}


def _is_compressed(message: bytes) -> bool:
    """Tell whether a record batch is compressed, from its description, a flatbuffer."""
    (root,) = struct.unpack_from("<I", message)
    place = _find_field(message, root, _HEADER)
    (batch,) = struct.unpack_from("<I", message, place)
    return _find_field(message, place + batch, _COMPRESSION) != 0


def _find_field(message: bytes, table: int, index: int) -> int:
    """Return where a field of a flatbuffer's table is; 0 where the table has none."""
    (back,) = struct.unpack_from("<i", message, table)
    fields = table - back
    (size,) = struct.unpack_from("<H", message, fields)
    at = 4 + 2 * index
    if at >= size:
        return 0
    (offset,) = struct.unpack_from("<H", message, fields + at)
    return table + offset if offset else 0
