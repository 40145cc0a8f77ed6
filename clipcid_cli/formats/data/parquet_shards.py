"""Parquet files with images in them as shards: a sample a row, in order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.captions import clean_captions, cut_cell, gather_captions, read_cell
from clipcid_cli.formats.data.image_column import (
    count_rows,
    have_images,
    is_image_column,
    open_parquet,
    read_batches,
    read_group,
)
from clipcid_cli.formats.data.samples import IMAGE_SUFFIXES, MAX_SAMPLE_BYTES, ByteRange, Columns, Sample
from clipcid_cli.formats.data.shard import Opened, ReadOptions, Shard
from clipcid_cli.formats.data.shard_files import is_parquet, name_shards
from clipcid_cli.formats.files import atomic_file
from clipcid_cli.formats.parquet import write_tables
from clipcid_cli.formats.skips import Skips

# Names that data sets give their columns, the first that there is being taken; the last ones are those of tars on the hub.
_IMAGES = ("image", "img", *IMAGE_SUFFIXES)
_CAPTIONS = (Columns.caption, "caption", "captions", "text", "txt")
_KEYS = (Columns.key, "__key__")
_LABELS = ("label", "cls")
# img2dataset writes rows of what it could not download, too: without an image, and with one of these in their `status`.
_STATUS = "status"
_FAILED = ("failed_to_download", "failed_to_resize")
# Readers hold one row group at a time.
_ROWS_OF_GROUP = 1024
_BYTES_OF_GROUP = 2**26
_KEY_FIELD = pa.field(Columns.key, pa.string())


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """The columns by which files of a data set are read."""

    image: str
    captions: tuple[str, ...]
    key: str | None  # None where the number of a row is its key
    label: str | None

    @property
    def others(self) -> list[str]:
        """The columns that are read, but for the images."""
        return [name for name in (*self.captions, self.key, self.label) if name is not None]


def open_tables(files: Sequence[str], options: ReadOptions) -> Opened | None:
    """Open parquet files of images as shards, by the columns of the first one; None where it has no column of images."""
    mixed = next((file for file in files if not is_parquet(file)), None)
    if mixed is not None:
        raise ClipcidError(f"{files[0]} is a parquet file, {mixed} is none.", "Give data of one form.")
    table, classes = _find_table(files[0], options.columns, options.caption_keys)
    if table is None:
        return None
    shards = [
        ParquetShard(
            name,
            file,
            prefix_keys=options.prefix_keys or table.key is None,  # numbers of rows repeat in other files
            max_sample_bytes=options.max_sample_bytes,
            table=table,
        )
        for name, file in zip(name_shards(files), files, strict=True)
    ]
    return Opened("parquet", shards, classes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetShard(Shard):
    """A parquet file with images in it, on this disk or behind a URL."""

    table: ImageTable

    def _read_own(self, skips: Skips) -> Iterator[Sample]:
        return _read_parquet(self.source, self.name, self.table, skips, self.max_sample_bytes)

    @property
    def is_streamed(self) -> bool:
        return True

    @property
    def image_column(self) -> str:
        return self.table.image

    def find_cut(self) -> str:
        if not is_remote(self.source):
            validate_parquet(self.source, self.table)
        return ""

    def estimate_samples(self) -> int:
        return count_rows(self.source)


def _find_table(
    path: str, columns: Columns, caption_keys: Sequence[str]
) -> tuple[ImageTable | None, tuple[str, ...] | None]:
    """Find the columns of a file of images, and the names of the classes where ``datasets`` has recorded them.

    A list, whose images are files of their own, has no such columns; nor have other tables.

    Args:
        columns: Their names, as far as they are not the default ones.
        caption_keys: The columns of captions; without one, a column of a usual name.
    """
    with open_parquet(path) as file:
        schema: pa.Schema = file.schema_arrow
    candidates = _list_image_columns(schema)
    if columns.image in schema.names or columns.image != Columns.image:
        candidates = [name for name in candidates if name == columns.image]
    image = _find_image(path, candidates)
    if image is None:
        return None, None

    def find(usual: Sequence[str], named: str, default: str) -> str | None:
        names = usual if named == default else [named]
        return next((name for name in names if name in schema.names), None)

    caption = find(_CAPTIONS, columns.caption, Columns.caption)
    key = find(_KEYS, columns.key, Columns.key)
    missing = next((name for name in columns.required(caption_keys) if name not in schema.names), None)
    if missing is not None:
        raise ClipcidError(
            f"{path} has no column {missing!r}; it has {', '.join(schema.names[:12])}.",
            "Name its columns: --image-column, --caption-column or --caption-key, --key-column.",
        )
    label = next((name for name in _LABELS if name in schema.names and _is_class(schema.field(name).type)), None)
    captions = tuple(caption_keys) or ((caption,) if caption is not None else ())
    return ImageTable(image, captions, key, label), _find_class_names(schema, label)


def no_images_error(path: str, columns: Columns) -> ClipcidError:
    """Say what a file in which `open_tables` finds no images has instead."""
    with open_parquet(path) as file:
        schema: pa.Schema = file.schema_arrow
    image_columns = _list_image_columns(schema)
    if image_columns:
        return ClipcidError(
            f"{path} has no images in column {columns.image!r}; it has some in {', '.join(image_columns[:12])}.",
            f"Give --image-column {image_columns[0]}.",
        )
    if columns.image in schema.names:
        return ClipcidError(
            f"{path} is a list of images (it has a column {columns.image!r}); a folder or pattern of lists is not read.",
            f"Give a list itself, for example {path}; write the rows of several into one.",
        )
    return ClipcidError(
        f"{path} has no column with one image per row, as bytes or {{bytes, path}}; "
        f"it has {', '.join(schema.names[:12])}.",
        "Write one image per row: columns with lists of images are not read.",
    )


def _list_image_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if is_image_column(field.type)]


def validate_parquet(path: str, table: ImageTable) -> None:
    """Check that a file is whole, as far as its end tells, and has the columns of the others."""
    with open_parquet(path) as file:
        _validate_columns(path, table, file.schema_arrow.names)


def _validate_columns(path: str, table: ImageTable, names: list[str]) -> None:
    missing = next((name for name in (table.image, *table.others) if name not in names), None)
    if missing is not None:
        raise ClipcidError(
            f"Shard {path} has no column {missing!r}, which the first file has; it has {', '.join(names[:12])}.",
            "Give the files of one data set, in which all have the same columns.",
        )


def _read_parquet(
    path: str, name: str, table: ImageTable, skips: Skips, max_bytes: int = MAX_SAMPLE_BYTES
) -> Iterator[Sample]:
    """Yield the samples of a file with the bytes of their images; count rows without image or key, and repeated keys.

    Args:
        max_bytes: What an image may have; a larger one is not held, and reading it is a TooManyBytesError.
    """
    seen = set[str]()
    row_index = -1
    with open_parquet(path) as file:
        _validate_columns(path, table, file.schema_arrow.names)
        columns = list(table.others)
        if _STATUS in file.schema_arrow.names:
            columns.append(_STATUS)
        for group in range(file.num_row_groups):
            # Before the images: a stream goes back for each column.
            others = list(_read_others(file, group, columns)) if columns else repeat({})
            for image, row in zip(read_group(file, group, table.image), others, strict=False):  # `repeat` has no end
                row_index += 1
                key = str(row_index) if table.key is None else read_cell(row[table.key])
                where = f"{name}/{key or row_index}"
                if not image:
                    if row.get(_STATUS) not in _FAILED:
                        skips.add("no_image", where)
                elif not key:
                    skips.add("no_key", where)
                elif key in seen:
                    skips.add("duplicate_key", where)
                else:
                    seen.add(key)
                    captions = [clean_captions(row[column], skips) for column in table.captions]
                    yield Sample(
                        key=key,
                        image=ByteRange(
                            path,
                            row_index,
                            len(image),
                            image if len(image) <= max_bytes else None,
                            column=table.image,
                            max_bytes=max_bytes,
                        ),
                        captions=gather_captions(table.captions, captions, skips),
                        **_read_classes(None if table.label is None else row[table.label]),
                    )


def _read_others(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a row group, without what is too long for a caption."""
    for batch in read_batches(file, group, columns):
        for row in batch.to_pylist():
            yield {column: cut_cell(cell) for column, cell in row.items()}


def copy_rows(path: str, name: str, target: Path, table: ImageTable, keys: Set[str]) -> int:
    """Copy the rows of samples with the given keys to a new file, with all columns; return how many there were.

    Keys are as the samples have them. Values are not changed, and the schema keeps its metadata. Where keys are numbers of
    rows, which change, the new file gets a column of them, after the file's name as the data set has them.
    """
    copied = 0

    def kept(file: pq.ParquetFile) -> Iterator[pa.Table]:
        nonlocal copied
        seen = set[str]()
        first = 0
        groups = (read_batches(file, group, file.schema_arrow.names) for group in range(file.num_row_groups))
        for batch in chain.from_iterable(groups):
            numbers = range(first, first + len(batch))
            first += len(batch)
            named = list(map(str, numbers)) if table.key is None else list(map(read_cell, batch[table.key].to_pylist()))
            is_kept = list[bool]()
            for key, has_image in zip(named, have_images(batch[table.image]), strict=True):
                is_sample = has_image and key != "" and key not in seen
                is_kept.append(is_sample and key in keys)
                if is_sample:
                    seen.add(key)
            copied += sum(is_kept)
            rows = pa.Table.from_batches([batch])
            if table.key is None:
                rows = rows.append_column(_KEY_FIELD, pa.array([f"{name}/{key}" for key in named], pa.string()))
            yield rows.filter(pa.array(is_kept))

    with open_parquet(path) as file, atomic_file(target) as copy:
        _validate_columns(path, table, file.schema_arrow.names)
        schema = file.schema_arrow if table.key is not None else file.schema_arrow.append(_KEY_FIELD)
        write_tables(copy, schema, kept(file), max_rows=_ROWS_OF_GROUP, max_bytes=_BYTES_OF_GROUP)
    return copied


def _find_image(path: str, candidates: list[str]) -> str | None:
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    usual = next((name for name in _IMAGES if name in candidates), None)
    if usual is None:
        raise ClipcidError(
            f"{path} has several columns with images: {', '.join(candidates[:12])}.", "Name one with --image-column."
        )
    return usual


def _is_class(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or (pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)))


def _read_classes(cell: int | list[int] | None) -> dict[str, Any]:
    """Return the class or the classes of a sample; −1, which data sets write where it is secret, is none."""
    if isinstance(cell, list):
        return {"labels": tuple(label for label in cell if label is not None)}
    return {} if cell is None or cell < 0 else {"label": cell}


def _find_class_names(schema: pa.Schema, label: str | None) -> tuple[str, ...] | None:
    with suppress(LookupError, TypeError, ValueError):
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(map(str, names))
    return None
