"""Image-text data in any supported form: shards in order, each a source of samples."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.addresses import is_pipe, is_remote, is_url, scheme_of, without_query
from clipcid_cli.formats.data.first_look import (
    Truncation,
    allow_cut,
    find_cut,
    find_indexed_cut,
    validate_shards,
)
from clipcid_cli.formats.data.left_out import find_lists
from clipcid_cli.formats.data.samples import MAX_SAMPLE_BYTES, Columns, ListFormat
from clipcid_cli.formats.data.shard import Opened, ReadOptions, Shard
from clipcid_cli.formats.data.shard_files import (
    SEPARATOR,
    find_files,
    is_benchmark,
    is_parquet,
    name_shards,
    split_spec,
)
from clipcid_cli.formats.data.tar_shards import open_tars
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.sidecar import DataSpec
from clipcid_cli.shown import is_redacted, redact

if TYPE_CHECKING:
    from clipcid_cli.formats.data.index import DataIndex

_TEXT_LISTS = (".csv", ".tsv")
# Schemes of URLs that are opened where a file names the data; others only where the user does.
_PLAIN_SCHEMES = frozenset({"http", "https", "s3", "gs", "gcs", "hf", "az", "abfs", "abfss", "hdfs"})

_ESTIMATED_FROM = 4  # shards


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Image-text data."""

    spec: str  # its name as given, without secrets; local paths are absolute
    # ``webdataset``, ``benchmark`` (CLIP_benchmark's folder), ``parquet`` (with the images in it), ``images`` or ``list``.
    kind: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None = None
    keys: str = "sample"  # ``sample`` or ``shard``: whether a key is the sample's own or begins with its shard's name
    columns: Columns = dataclasses.field(default_factory=Columns)
    # Whether each line of a ``.txt`` is a caption, where that was asked for.
    caption_lines: bool = False
    list_format: ListFormat = dataclasses.field(default_factory=ListFormat)
    caption_keys: tuple[str, ...] = ()  # where captions are; empty where they are in the usual places
    index_folder: Path | None = None
    index: DataIndex | None = None  # its index, where it is finished and no shard has changed since
    truncation: Truncation | None = None  # where the readable part of truncated tars is used

    def with_index(self, index: DataIndex | None) -> Dataset:
        """Return the data with its index, which says all that was held of the rows of a folder or list."""
        if index is not None:
            self.shards[0].forget()
        return dataclasses.replace(self, index=index)

    def fingerprints(self) -> list[FileRecord]:
        """Describe the content of every shard for a sidecar: from the index, or from a small part of each."""
        if self.index is not None:
            return [record.fingerprint for record in self.index.records]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(methodcaller("fingerprint"), self.shards))

    @property
    def has_tars(self) -> bool:
        """Whether its shards are tars."""
        return self.kind in ("webdataset", "benchmark")

    def choose_own(self, paths: Iterable[str]) -> set[str]:
        """Return which of some files are of the data: its shards, or images in the folder or of the list."""
        asked = set(paths)
        if self.kind == "images":
            return {path for path in asked if path.startswith(f"{self.spec}/") and os.path.normpath(path) == path}
        if self.kind == "list":
            return asked & {sample.image.path for shard in self.shards for sample in shard.samples()}
        return asked & {shard.file for shard in self.shards}

    def estimate_samples(self) -> int:
        """Estimate how many samples there are from a few shards spread over the data; exact where there is an index."""
        if self.index is not None:
            return int(self.index.sizes.sum())
        step = max(1, len(self.shards) // _ESTIMATED_FROM)
        probed = self.shards[::step][:_ESTIMATED_FROM]
        samples = 0
        for shard in probed:
            samples += shard.estimate_samples()
        return round(samples * len(self.shards) / len(probed))

    def describe(self) -> DataSpec:
        """Return the name and the options of the data, from which `open_described` opens it again."""
        columns = self.columns
        named = (columns.image, columns.caption, columns.key)
        form = self.list_format
        named_form = (form.root, form.separator, form.encoding)
        return DataSpec(self.spec, self.keys, *named, self.caption_lines, self.caption_keys, *named_form)


def list_shards(spec: str) -> list[str]:
    """Name the shards that local data has by now, without opening one; none of what is behind a URL or a command."""
    if any(map(is_remote, spec.split(SEPARATOR))):
        return []
    return name_shards(find_files(spec) or [])


def names_command(spec: str) -> bool:
    """Tell whether the name of a data set holds a ``pipe:`` command."""
    return any(map(is_pipe, split_spec(spec)))


def open_described(
    description: DataSpec,
    index_root: Path | None = None,
    *,
    schemes: tuple[str, ...] = (),
    max_sample_bytes: int = MAX_SAMPLE_BYTES,
) -> Dataset:
    """Open recorded data as `open_dataset` does: the record is from a file, which may be someone else's.

    So no command is run, only common schemes are opened, and what the user allows is not taken from the record.
    """
    if names_command(description.spec):
        raise ClipcidError(
            f"The data is the output of a command, {description.spec}, which is not run unless you give it yourself.",
            "If you trust the command, give it as the data.",
        )
    if is_redacted(description.spec):
        raise ClipcidError(
            f"The data is at {description.spec}, an address whose secrets are not recorded.",
            "Give the data again, with its whole address.",
        )
    uncommon = [part for part in split_spec(description.spec) if is_url(part) and scheme_of(part) not in _PLAIN_SCHEMES]
    if uncommon:
        raise ClipcidError(
            f"The data is at {uncommon[0]}; the scheme {scheme_of(uncommon[0])} is not opened unless you give it yourself.",
            "If you trust the address, give it as the data.",
        )
    if description.list_root is not None and is_remote(description.spec):
        raise ClipcidError(
            f"The data is the list {description.spec}, whose relative paths are in {description.list_root}: a list that is "
            "not on this disk names files on it only where you say so.",
            f"If you trust the list, give it as the data, with --list-root {description.list_root}.",
        )
    columns = Columns(description.image, description.caption, description.key)
    return open_dataset(
        description.spec,
        description.keys,
        columns,
        index_root,
        caption_lines=description.caption_lines,
        caption_keys=description.caption_key,
        list_format=ListFormat(description.list_root, description.list_separator, description.list_encoding),
        schemes=schemes,
        max_sample_bytes=max_sample_bytes,
        max_bad_fraction=1.0,  # the step that recorded it has accepted the data
    )


def open_dataset(
    spec: str | Path,
    keys: str = "sample",
    columns: Columns | None = None,
    index_root: Path | None = None,
    *,
    caption_lines: bool = False,
    caption_keys: tuple[str, ...] = (),
    schemes: tuple[str, ...] = (),
    max_sample_bytes: int = MAX_SAMPLE_BYTES,
    max_bad_fraction: float = 0.0,
    list_format: ListFormat | None = None,
) -> Dataset:
    """Open image-text data that the user has named in this run; what a file names is for `open_described`.

    Refused within seconds: when it contains no shard or image, a local shard is truncated or not what it is called, the
    first shards contain no image, or keys repeat across the shards looked at.

    Args:
        spec: A folder of tar shards (CLIP_benchmark's among them) or of parquet files with images, one such file, a
            pattern, several of these with ``::`` between them, a folder of images, a csv, tsv or parquet list; local or a
            URL that fsspec knows. A ``pipe:`` command is run by a shell.
        keys: ``shard`` puts the shard's name before each key, for data whose keys repeat across shards.
        index_root: Folder of indexes. Data with an up-to-date index is opened without reading its shards.
        caption_lines: Whether each line of a ``.txt`` is a caption, as always in CLIP_benchmark's folders.
        caption_keys: Where the captions of a sample are, all of them: extensions of members or fields of the json member
            (``json:FIELD``) of tars, columns of a list or a parquet file. Without one ``txt``, or the column of `columns`.
        schemes: Of URLs that the cells of a list may name, beside http and https.
        max_sample_bytes: What one file of a sample may have; samples with a larger one are skipped.
        max_bad_fraction: What may be missing of the data at the end of truncated local tars, whose readable part is used.
        list_format: How a list is read.
    """
    spec = SEPARATOR.join(split_spec(str(spec)))
    options = ReadOptions(
        prefix_keys=keys == "shard",
        columns=columns or Columns(),
        caption_lines=caption_lines,
        caption_keys=tuple(dict.fromkeys(key.removeprefix(".") for key in caption_keys)),
        schemes=schemes,
        max_sample_bytes=max_sample_bytes,
        list_format=list_format or ListFormat(),
    )
    opened = _open_shards(spec, options)
    if opened.kind != "list" and options.list_format != ListFormat():
        raise ClipcidError(
            f"--list-root, --list-separator and --list-encoding say how a list is read, and {spec} is none.",
            f"Omit them{_name_lists(spec, opened.kind)}.",
        )
    dataset = Dataset(
        redact(spec),
        opened.kind,
        tuple(opened.shards),
        opened.classes,
        keys,
        options.columns,
        caption_lines,
        options.list_format,
        options.caption_keys,
    )
    if index_root is not None:
        dataset = _find_index(dataset, index_root, max_sample_bytes)
    index = dataset.index
    cut_off = find_cut(dataset.shards) if index is None else find_indexed_cut(index)
    if cut_off:
        shards, truncation = allow_cut(dataset.shards, cut_off, max_bad_fraction)
        dataset = dataclasses.replace(dataset, shards=shards, truncation=truncation)
    if index is None:
        validate_shards(dataset.spec, dataset.shards, has_index=dataset.index_folder is not None)
    return dataset


def _open_shards(spec: str, options: ReadOptions) -> Opened:
    """Open the shards of data by its kind, of which each has a module of its own."""
    if without_query(spec).lower().endswith(_TEXT_LISTS):
        from clipcid_cli.formats.data.lists import open_list

        return open_list(spec, options)
    files = find_files(spec)
    if files is None:
        from clipcid_cli.formats.data.folders import open_folder

        return open_folder(spec, options)
    if is_parquet(files[0]):
        return _open_parquet(spec, files, options)
    return open_tars(files, options, is_benchmark=is_benchmark(spec))


def _open_parquet(spec: str, files: Sequence[str], options: ReadOptions) -> Opened:
    """Open parquet files: with images in them, one that is a list of images, or some that lie in a folder of images."""
    from clipcid_cli.formats.data.folders import find_images
    from clipcid_cli.formats.data.lists import open_list
    from clipcid_cli.formats.data.parquet_shards import no_images_error, open_tables

    tables = open_tables(files, options)
    if tables is not None:
        return tables
    if files == [spec]:
        return open_list(spec, options)
    if os.path.isdir(spec) and (images := find_images(spec, options)):
        return images
    raise no_images_error(files[0], options.columns)


def _name_lists(spec: str, kind: str) -> str:
    """Return the other remedy for flags of lists where a folder of lists, or of data with lists, was named."""
    lists = find_lists(spec, kind) if os.path.isdir(spec) else []
    return f", or give a list of that folder: {', '.join(lists[:3])}" if lists else ""


def _find_index(dataset: Dataset, root: Path, max_sample_bytes: int) -> Dataset:
    """Return data with the folder of its index, which depends on how it is read, and its index where that is finished."""
    from clipcid_cli.formats.data.index import index_folder, open_index  # data of evaluations has none

    read_so: dict[str, Any] = {"keys": dataset.keys, "caption_lines": dataset.caption_lines}
    read_so["caption_keys"] = dataset.caption_keys
    read_so |= dataclasses.asdict(dataset.columns)
    if max_sample_bytes != MAX_SAMPLE_BYTES:  # the index says what was skipped
        read_so["max_sample_bytes"] = max_sample_bytes
    if dataset.list_format != ListFormat():
        read_so["list_format"] = dataclasses.asdict(dataset.list_format)
    folder = index_folder(root, dataset.kind, read_so)
    return dataclasses.replace(dataset, index_folder=folder).with_index(open_index(folder, dataset.shards))
