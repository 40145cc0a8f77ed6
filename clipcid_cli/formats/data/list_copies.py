"""New lists of some of the images of a list: the same columns, with paths that lead to the images from anywhere."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import without_query
from clipcid_cli.formats.data.lists import ListImages, find_form, read_frames, read_texts
from clipcid_cli.formats.data.opening import local_file
from clipcid_cli.formats.data.samples import Columns
from clipcid_cli.formats.data.slices import VIRTUAL_SHARD
from clipcid_cli.formats.files import atomic_file, reading
from clipcid_cli.formats.parquet import write_tables

if TYPE_CHECKING:
    import pandas as pd

_ROWS_OF_GROUP = 2**17
_BYTES_OF_GROUP = 2**26


class _KeptRows(NamedTuple):
    """The rows of a slice that are kept: their numbers in it, where their images are, and their keys."""

    rows: list[int]
    paths: list[str]
    keys: list[str]


def copy_list(images: ListImages, target: Path, keys_of: Callable[[int], Set[str]]) -> list[int]:
    """Copy the rows of samples with the given keys to a new list of the same form; return how many of each slice.

    All columns stay, and the encoding of a text. Paths become absolute, so that they lead to the images from the new
    place. A list whose keys are its paths gets a column of them, so that keys stay the same.

    Args:
        keys_of: The keys of a slice to keep; called for one slice after the other.
    """
    source = images.source
    columns = images.options.columns
    list_format = images.options.list_format
    sizes = list[int]()

    def choose(frame: pd.DataFrame) -> _KeptRows:
        keys = keys_of(len(sizes))
        paths = read_texts(source, frame, columns.image)
        named = read_texts(source, frame, columns.key) if columns.key in frame else paths
        seen = set[str]()
        kept = _KeptRows([], [], [])
        for row, (key, path) in enumerate(zip(named, paths, strict=True)):
            if key in keys and path and key not in seen:
                kept.rows.append(row)
                kept.paths.append(images.resolve(path))
                kept.keys.append(key)
            seen.add(key)
        sizes.append(len(kept.rows))
        return kept

    with local_file(source) as file, atomic_file(target) as copy:
        name = without_query(source).lower()
        if name.endswith(".parquet"):
            with reading(file, "a parquet file", "Give a csv, tsv or parquet file with a header."):
                _copy_table(pq.ParquetFile(file), copy, columns, choose)
            return sizes
        encoding, separator = find_form(name, file, list_format)
        encoder = codecs.getincrementalencoder(encoding)()  # a mark of UTF-16 is only at the beginning
        separator = "\t" if len(separator) > 1 else separator  # pandas writes no longer one
        for frame in read_frames(source, file, list_format):
            kept = choose(frame)
            rows = frame.iloc[kept.rows].assign(**{columns.image: kept.paths})
            if columns.key not in rows:
                rows[columns.key] = kept.keys
            text = rows.to_csv(sep=separator, index=False, header=len(sizes) == 1, lineterminator="\n")
            try:
                copy.write(encoder.encode(text))
            except UnicodeEncodeError as error:  # of a folder in the absolute paths
                raise ClipcidError(
                    f"The new list of {source} cannot be written as {encoding}, which has no {error.object[error.start]!r}.",
                    "Save the list as UTF-8, and embed it without --list-encoding.",
                ) from error
    return sizes


def _copy_table(
    file: pq.ParquetFile,
    copy: IO[bytes],
    columns: Columns,
    choose: Callable[[pd.DataFrame], _KeptRows],
) -> None:
    schema = file.schema_arrow
    new_key = columns.key not in schema.names
    used = [columns.image] if new_key else [columns.image, columns.key]
    if new_key:
        schema = schema.append(pa.field(columns.key, pa.string()))

    def kept_rows() -> Iterator[pa.Table]:
        for table in _slice_rows(file, VIRTUAL_SHARD):
            frame = table.select(used).to_pandas(ignore_metadata=True, integer_object_nulls=True).astype(object)
            kept = choose(frame.where(frame.notna(), None))
            rows = table.take(pa.array(kept.rows, pa.int64()))
            place = rows.schema.get_field_index(columns.image)
            field = rows.schema.field(place)
            rows = rows.set_column(place, field, pa.array(kept.paths, pa.string()).cast(field.type))
            if new_key:
                rows = rows.append_column(schema.field(columns.key), pa.array(kept.keys, pa.string()))
            yield rows.cast(schema)

    write_tables(copy, schema, kept_rows(), max_rows=_ROWS_OF_GROUP, max_bytes=_BYTES_OF_GROUP)


def _slice_rows(file: pq.ParquetFile, size: int) -> Iterator[pa.Table]:
    """Yield the rows of a file, `size` at a time whatever its row groups are."""
    pending = file.schema_arrow.empty_table()
    for batch in file.iter_batches(size):
        pending = pa.concat_tables([pending, pa.Table.from_batches([batch])])
        while len(pending) >= size:
            yield pending.slice(0, size)
            pending = pending.slice(size)
    if len(pending):
        yield pending
