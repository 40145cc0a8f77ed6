"""Image-text data in any supported form: shards in order, each a list of samples."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import math
import os
import re
import string
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import is_benchmark, list_benchmark_tars
from clipcid_cli.formats.data.folders_and_lists import LIST_SUFFIXES, TEXT_LISTS, Images
from clipcid_cli.formats.data.image_column import count_rows
from clipcid_cli.formats.data.index import DataIndex, index_folder, open_index, repeated_key
from clipcid_cli.formats.data.parquet_shards import ImageTable, find_table, no_images_error, validate_parquet
from clipcid_cli.formats.data.remote import (
    is_pipe,
    is_remote,
    is_url,
    list_folder,
    scheme_of,
    strip_file_scheme,
    without_query,
)
from clipcid_cli.formats.data.samples import MAX_SAMPLE_BYTES, ByteRange, Columns, ListFormat, Sample, natural_key
from clipcid_cli.formats.data.shard import Shard, cut
from clipcid_cli.formats.data.tars import COPY_AGAIN, CutTarError, validate_member_keys, validate_tar
from clipcid_cli.formats.files import open_regular
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.sidecar import DataSpec
from clipcid_cli.formats.skips import Skips
from clipcid_cli.shown import is_redacted, redact

_FORMS = (
    "Give a folder of .tar shards or of parquet files with images, one such file, a pattern such as "
    "data/{00000..00099}.tar, a folder of images, or a csv, tsv or parquet list."
)
_SEPARATOR = "::"  # webdataset's, between several folders, tars or patterns

# Up to this size, keys are compared across all shards when data is opened; of larger data, or data that will have an index,
# those of as many shards as can be listed in this time, two at least, and all once they have been read.
_SMALL = 2**30
_KEY_SECONDS = 1.0

# Schemes of URLs that are opened where a file names the data; others only where the user does.
_PLAIN_SCHEMES = frozenset({"http", "https", "s3", "gs", "gcs", "hf", "az", "abfs", "abfss", "hdfs"})

_SHARD_SUFFIXES = (".tar", ".parquet")
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SPLIT = re.compile(r"(.+)-\d+-of-(\d+).*[.]parquet$")  # as ``datasets`` names files

_MAX_SHARDS = 1_000_000  # of a pattern: LAION-5B has some 232,000
_MANY = 10**15  # what is counted as more is so many
_MAX_NESTED = 100
_NUMBERS = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET = string.ascii_uppercase + string.ascii_lowercase  # in the order of ranges between braces
_GROUP = re.compile(r"\{([^{}]*)\}")
_ESCAPED = re.compile(r"\\.")
_COUNTED = re.compile("\0(\\d+)\0")

_LOOKED_AT = 10  # shards, for an image
_ESTIMATED_FROM = 4
_PROBED = 100
_SAMPLES_OF_COMMAND = 10_000  # as img2dataset makes shards

# Of these forms only the head and the tail of an image are hashed.
_COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8")
_WINDOW = 4096
_HASHED_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What is missing of data at the end of truncated tars."""

    problem: str  # which tar is truncated, the first of them, and where; without a full stop
    fraction: float  # of the data, estimated from the sizes of the whole tars
    is_known: bool  # whether there are whole tars

    def __str__(self) -> str:
        lost = f"about {self.fraction:.1%} of the data" if self.is_known else "an unknown part of the data"
        return f"{self.problem}; {lost} is missing"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Image-text data."""

    spec: str  # its name as given, without secrets; local paths are absolute
    # ``webdataset``, ``benchmark`` (CLIP_benchmark's folder), ``parquet`` (with the images in it), ``images``, ``list`` or
    # ``texts``.
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
        if index is not None and self.shards[0].slices is not None:
            self.shards[0].slices.forget()
        return dataclasses.replace(self, index=index)

    def fingerprints(self) -> list[FileRecord]:
        """Describe the content of every shard for a sidecar: from the index, or from a small part of each."""
        if self.index is not None:
            return [record.fingerprint for record in self.index.records]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda shard: shard.fingerprint(), self.shards))

    @property
    def is_counted(self) -> bool:
        """Whether the number of samples is known without reading the shards."""
        slices = self.shards[0].slices
        return self.index is not None or (slices is not None and slices.total is not None)

    def choose_own(self, paths: Iterable[str]) -> set[str]:
        """Return which of some files are of the data: its shards, or images in the folder or of the list."""
        asked = set(paths)
        slices = self.shards[0].slices
        if slices is None:
            return asked & {shard.file for shard in self.shards}
        if self.kind == "images":
            return {path for path in asked if path.startswith(f"{self.spec}/") and os.path.normpath(path) == path}
        return asked & {sample.image.path for shard in self.shards for sample in shard.samples()}

    def estimate_samples(self) -> int:
        """Estimate how many samples there are from the first samples of a few shards spread over the data.

        Exact where there is an index, and of a folder or a list. Of commands nothing is known.
        """
        if self.index is not None:
            return int(self.index.sizes.sum())
        slices = self.shards[0].slices
        if slices is not None and slices.total is not None:
            return slices.total
        step = max(1, len(self.shards) // _ESTIMATED_FROM)
        probed = self.shards[::step][:_ESTIMATED_FROM]
        return round(sum(map(_estimate_samples, probed)) * len(self.shards) / len(probed))

    def describe(self) -> DataSpec:
        """Return the name and the options of the data, from which `open_described` opens it again."""
        columns = self.columns
        named = (columns.image, columns.caption, columns.key)
        form = self.list_format
        named_form = (form.root, form.separator, form.encoding)
        return DataSpec(self.spec, self.keys, *named, self.caption_lines, self.caption_keys, *named_form)


def list_shards(spec: str) -> list[str]:
    """Name the shards that local data has by now, without opening one; none of what is behind a URL or a command."""
    if any(map(is_remote, spec.split(_SEPARATOR))):
        return []
    return _name_shards(_find_files(spec) or [])


def names_command(spec: str) -> bool:
    """Tell whether the name of a data set holds a ``pipe:`` command."""
    return any(map(is_pipe, _split(spec)))


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
    uncommon = [part for part in _split(description.spec) if is_url(part) and scheme_of(part) not in _PLAIN_SCHEMES]
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
    spec = _SEPARATOR.join(_split(str(spec)))
    columns = columns or Columns()
    list_format = list_format or ListFormat()
    caption_keys = tuple(dict.fromkeys(key.removeprefix(".") for key in caption_keys))
    prefix_keys = keys == "shard"
    place = without_query(spec).lower()
    files = None if place.endswith(TEXT_LISTS) else _find_files(spec)
    table, classes = (None, None) if files is None else _find_table(files, columns, caption_keys)
    if table is None and place.endswith(LIST_SUFFIXES) and files in (None, [spec]):
        kind = "list"
        images = Images(
            spec,
            columns,
            caption_keys=caption_keys,
            max_sample_bytes=max_sample_bytes,
            schemes=schemes,
            list_format=list_format,
        )
        shards = cut(images, spec, prefix_keys=prefix_keys, max_sample_bytes=max_sample_bytes)
    elif files is not None and (table is not None or not _is_parquet(files[0])):
        kind = "parquet" if table is not None else "benchmark" if is_benchmark(spec) else "webdataset"
        if table is None:
            validate_member_keys(caption_keys)
        has_numbers = table is not None and table.key is None  # for keys, those of rows in a file
        shards = tuple(
            Shard(
                name,
                file,
                prefix_keys=prefix_keys or has_numbers,
                caption_lines=caption_lines or kind == "benchmark",
                caption_keys=caption_keys,
                table=table,
                max_sample_bytes=max_sample_bytes,
            )
            for name, file in zip(_name_shards(files), files, strict=True)
        )
    else:
        kind = "images"
        images = Images(spec, caption_lines=caption_lines, max_sample_bytes=max_sample_bytes)
        shards = ()
        if os.path.isdir(spec):
            shards = cut(images, spec, prefix_keys=prefix_keys, max_sample_bytes=max_sample_bytes)
        if not shards:
            if files is not None:
                raise no_images_error(files[0], columns)
            if os.path.isdir(spec):
                _refuse_compressed(spec, os.listdir(spec))
            inside = (path for path in Path(spec).glob("*/*") if path.suffix in _SHARD_SUFFIXES)
            inner = sorted({str(path.parent) for path in inside}, key=natural_key)
            fix = f"Its folders {', '.join(inner[:6])} contain shards: give one of them." if inner else _FORMS
            raise ClipcidError(f"{spec} contains no .tar shard and no image.", fix)
        classes = images.class_names
        if caption_keys:
            raise ClipcidError(
                f"--caption-key names members of tars or columns, and {spec} is a folder of images.",
                "Omit it: their captions are in a .txt beside each image.",
            )
    if kind != "list" and list_format != ListFormat():
        raise ClipcidError(
            f"--list-root, --list-separator and --list-encoding say how a list is read, and {spec} is none.",
            "Omit them.",
        )
    dataset = Dataset(redact(spec), kind, shards, classes, keys, columns, caption_lines, list_format, caption_keys)
    if index_root is not None:
        read_so = {"keys": keys, "caption_lines": caption_lines, "caption_keys": caption_keys}
        read_so |= dataclasses.asdict(columns)
        if max_sample_bytes != MAX_SAMPLE_BYTES:  # the index says what was skipped
            read_so["max_sample_bytes"] = max_sample_bytes
        if list_format != ListFormat():
            read_so["list_format"] = dataclasses.asdict(list_format)
        folder = index_folder(index_root, kind, read_so)
        dataset = dataclasses.replace(dataset, index_folder=folder).with_index(open_index(folder, shards))
    dataset = _allow_cut(dataset, _find_cut(dataset), max_bad_fraction)
    if dataset.index is None:
        _validate_shards(dataset)
    return dataset


def _estimate_samples(shard: Shard) -> int:
    if shard.table is not None:
        return count_rows(shard.source)
    if is_pipe(shard.file):
        return _SAMPLES_OF_COMMAND
    if not is_url(shard.file):
        return len(shard.samples())
    first = list(islice(shard.stream(), _PROBED))
    if len(first) < _PROBED:
        return len(first)
    size = shard.fingerprint().size
    return round(size * (_PROBED - 1) / (first[-1].image.offset - first[0].image.offset))


def _find_cut(dataset: Dataset) -> dict[int, str]:
    """Look whether the local shards are whole; return what is wrong with truncated ones, other damage being an error."""
    if dataset.index is not None:
        listed = enumerate(zip(dataset.shards, dataset.index.records, strict=True))
        return {
            number: f"Shard {shard.source} is truncated."
            for number, (shard, record) in listed
            if "cut_off" in record.skips.counts
        }
    local = {number: shard for number, shard in enumerate(dataset.shards) if not is_remote(shard.source)}
    with ThreadPoolExecutor(16) as pool:
        found = zip(local, pool.map(_validate_file, local.values()), strict=True)
        return {number: problem for number, problem in found if problem}


def _validate_file(shard: Shard) -> str:
    """Check that a file is whole; return how a tar is truncated."""
    if shard.table is not None:
        validate_parquet(shard.source, shard.table)
    elif shard.is_tar:
        try:
            validate_tar(Path(shard.source))
        except CutTarError as error:
            return error.message
    return ""


def _allow_cut(dataset: Dataset, cut_off: dict[int, str], max_bad_fraction: float) -> Dataset:
    """Use what is readable of truncated tars, unless too much is missing.

    How much is estimated from the median size of the whole tars; without any, all may be missing.
    """
    if not cut_off:
        return dataset
    sizes = [shard.stamp()[0] for shard in dataset.shards]
    whole = [size for number, size in enumerate(sizes) if size and number not in cut_off]
    fraction = 1.0
    if whole:
        missing = sum(max(1.0, median(whole) - sizes[number]) for number in cut_off)
        fraction = missing / (missing + sum(sizes))
    truncation = Truncation(next(iter(cut_off.values())).removesuffix("."), fraction, bool(whole))
    if fraction > max_bad_fraction:
        enough = math.ceil(fraction * 1000) / 1000
        raise CutTarError(
            f"{truncation}, more than the allowed {max_bad_fraction:.1%}.",
            f"{COPY_AGAIN}\nTo use the samples before its end, add --max-bad-fraction {enough:g}.",
        )
    shards = (dataclasses.replace(shard, is_cut=number in cut_off) for number, shard in enumerate(dataset.shards))
    return dataclasses.replace(dataset, shards=tuple(shards), truncation=truncation)


def _validate_shards(dataset: Dataset) -> None:
    """Look into the first shards: some have an image, and keys differ, as far as that is quick."""
    tars = [shard for shard in dataset.shards if shard.is_tar]
    local = [Path(shard.source) for shard in tars if not is_remote(shard.source)]
    skips = Skips()
    if all(next(shard.stream(skips), None) is None for shard in dataset.shards[:_LOOKED_AT]):
        looked = "it" if len(dataset.shards) <= _LOOKED_AT else f"the first {_LOOKED_AT} of its shards"
        without = skips.examples.get("no_image")
        seen = f" ({skips.total} without one, first {without[0]})" if without else ""
        raise ClipcidError(f"{dataset.spec}: no sample with an image in {looked}{seen}.", _FORMS)
    small = sum(os.path.getsize(path) for path in local) <= _SMALL
    # Reading remote ones whole would take longer than "quick"; a key that begins with the shard's name is in no other.
    if len(local) == len(tars) > 1 and not tars[0].prefix_keys:
        _validate_keys(tars, math.inf if small and dataset.index_folder is None else _KEY_SECONDS)


def _validate_keys(tars: Sequence[Shard], seconds: float) -> None:
    """Refuse a key of two tars, as far as that is found in this time; tars of one name, as of two crawls, come first."""
    names = [shard.name.rpartition("/")[2] for shard in tars]
    count_of = Counter(names)
    order = sorted(range(len(tars)), key=lambda number: (count_of[names[number]] == 1, names[number]))
    end = time.perf_counter() + seconds
    listed = list[Shard]()
    hashes = list[npt.NDArray[np.int64]]()
    for number in order:
        if len(listed) > 1 and time.perf_counter() > end:
            break
        listed.append(tars[number])
        hashes.append(np.fromiter((hash(sample.key) for sample in tars[number].stream()), np.int64))
    hash_N = np.concatenate(hashes)
    owner_N = np.repeat(np.arange(len(listed)), [len(part) for part in hashes])
    sorted_N = np.argsort(hash_N, kind="stable")
    repeats = np.flatnonzero(hash_N[sorted_N][1:] == hash_N[sorted_N][:-1])
    pairs = zip(owner_N[sorted_N[repeats]].tolist(), owner_N[sorted_N[repeats + 1]].tolist(), strict=True)
    for one, other in sorted(set(pairs)):
        keys = {sample.key for sample in listed[one].stream()}
        key = next((sample.key for sample in listed[other].stream() if sample.key in keys), None)
        if key is not None:
            raise repeated_key(key, listed[one].name, listed[other].name)


def _find_files(spec: str) -> list[str] | None:
    """List the tars or parquet files that `spec` refers to, in natural order; None for a folder without any."""
    # A folder may be called like a pattern.
    if (_SEPARATOR in spec or "{" in spec) and (is_remote(spec) or not os.path.exists(spec)):
        files = list[str]()
        for part in _expand(spec):
            # A tar may turn out to be missing.
            found = _find_files(part) if is_remote(part) or os.path.isdir(part) else glob.glob(part) or [part]
            if found is None:
                raise ClipcidError(f"{part} contains no .tar shard.", _FORMS)
            files += found
    elif (
        is_pipe(spec)
        or (is_url(spec) and without_query(spec).lower().endswith(_SHARD_SUFFIXES))
        or os.path.isfile(spec)
    ):
        files = [spec]
    elif is_url(spec):
        files = _choose_form(spec, list_folder(spec))
        if not files:
            raise ClipcidError(
                f"{spec} contains no .tar shard.", "Give a pattern such as s3://bucket/data/{00000..00099}.tar."
            )
    elif not os.path.isdir(spec):
        files = glob.glob(spec)
        if not files:
            raise ClipcidError(f"There is no data at {spec}.", _FORMS)
    elif is_benchmark(spec):
        files = list_benchmark_tars(Path(spec))
    else:
        visible = [os.path.join(spec, name) for name in os.listdir(spec) if not name.startswith(".")]
        files = _choose_form(spec, visible)
    return sorted(files, key=natural_key) or None


def _choose_form(folder: str, paths: list[str]) -> list[str]:
    """Return the tars of a folder, or else its parquet files: tools write these beside tars, without images."""
    for suffix in _SHARD_SUFFIXES:
        files = [path for path in paths if without_query(path).lower().endswith(suffix)]
        if files:
            break
    if suffix == ".tar":
        _refuse_compressed(folder, paths)
    splits = {found[1]: int(found[2]) for path in files if (found := _SPLIT.match(path.rpartition("/")[2]))}
    if len(splits) > 1:
        ends = {split: f"{{00000..{number - 1:05d}}}-of-{number:05d}.parquet" for split, number in splits.items()}
        patterns = (f'"{folder.rstrip("/")}/{split}-{end if is_url(folder) else "*"}"' for split, end in ends.items())
        raise ClipcidError(
            f"{folder} holds several splits of a data set.", f"Give one of them: {', '.join(sorted(patterns))}."
        )
    return files


def _refuse_compressed(folder: str, paths: list[str]) -> None:
    """Refuse a folder with compressed tars, which would be missing from the data; unpacked ones may lie beside them."""
    names = {path.rpartition("/")[2] for path in paths}
    packed = [name for name in sorted(names, key=natural_key) if name.lower().endswith(_COMPRESSED_TARS)]
    packed = [name for name in packed if f"{name[: name.lower().rindex('.t')]}.tar" not in names]
    if packed:
        raise ClipcidError(
            f"{folder} contains compressed tars, from which samples cannot be read one by one: {len(packed):,}, "
            f"first {packed[0]}.",
            f"Unpack them to plain ones, for example: gunzip {folder.rstrip('/')}/{packed[0]}\n"
            f'Or name the plain ones alone, for example "{folder.rstrip("/")}/{{00000..00099}}.tar".',
        )


def _is_parquet(file: str) -> bool:
    return without_query(file).lower().endswith(".parquet") and not is_pipe(file)


def _find_table(
    files: list[str], columns: Columns, caption_keys: tuple[str, ...]
) -> tuple[ImageTable | None, tuple[str, ...] | None]:
    """Find columns and classes of parquet files of images; None for tars, and for parquet files without images."""
    if not _is_parquet(files[0]):
        return None, None
    mixed = next((file for file in files if not _is_parquet(file)), None)
    if mixed is not None:
        raise ClipcidError(f"{files[0]} is a parquet file, {mixed} is none.", "Give data of one form.")
    return find_table(files[0], columns, caption_keys)


def _expand(spec: str) -> list[str]:
    number = _count_expansions(spec)
    if number > _MAX_SHARDS:
        raise ClipcidError(
            f"{spec} names {number:,} shards, more than {_MAX_SHARDS:,}.", "Check the numbers between the braces."
        )
    from webdataset.shardlists import expand_urls  # 0.2 s, which only patterns cost

    try:
        return [part for part in expand_urls(spec) if part]
    except ValueError as error:  # braceexpand.UnbalancedBracesError
        raise ClipcidError(f"{spec}: the braces are unbalanced.", _FORMS) from error
    except AssertionError as error:
        raise ClipcidError(
            f"{spec}: webdataset takes ${{NAME}} from the environment variable WDS_NAME, which is not set.",
            "Set it, or write the value in place of it.",
        ) from error


def _count_expansions(spec: str) -> int:
    """Count what braces make, before a list of it fills the memory.

    From the inside out: a group makes the sum of what its alternatives make, an alternative the product of its groups.
    """
    return sum(map(_count_part, spec.replace("\0", "").split(_SEPARATOR)))


def _count_part(part: str) -> int:
    part = _ESCAPED.sub("", part)
    for _ in range(_MAX_NESTED):
        counted = _GROUP.sub(lambda group: f"\0{_count_group(group[1])}\0", part)
        if counted == part:
            return _count_alternative(part)
        part = counted
    return _MANY


def _count_group(content: str) -> int:
    numbers = _NUMBERS.fullmatch(f"{{{content}}}")
    letters = _LETTERS.fullmatch(content)
    if numbers is not None:
        first, last, step = (int(each or 1) for each in numbers.groups())
    elif letters is not None:
        first, last = (_ALPHABET.index(letter) for letter in letters.groups()[:2])
        step = int(letters[3] or 1)
    else:
        return min(_MANY, sum(map(_count_alternative, content.split(","))))
    return abs(last - first) // max(1, abs(step)) + 1


def _count_alternative(text: str) -> int:
    count = 1
    for counted in _COUNTED.findall(text):
        count = min(_MANY, count * int(counted))
    return count


def _split(spec: str) -> list[str]:
    """Return the parts of a spec as they are opened: URLs, commands and absolute paths."""
    return [_normalize(part) for part in spec.split(_SEPARATOR)]


def _normalize(spec: str) -> str:
    """Make a local path absolute."""
    spec = strip_file_scheme(spec)
    return spec if not spec or is_remote(spec) else os.path.abspath(os.path.expanduser(spec))


def _name_shards(files: list[str]) -> list[str]:
    """Name shards by their files, preceded by as many folders as it takes to distinguish them."""
    paths = [_path_in_command(redact(file)) if is_pipe(file) else redact(without_query(file)) for file in files]
    names = [os.path.splitext(path)[0] if path.lower().endswith(_SHARD_SUFFIXES) else path for path in paths]
    parts = [name.split("/") for name in names]
    depth = 1
    if len(set(map(tuple, parts))) < len(files):
        raise ClipcidError("The pattern lists a shard twice.", "List each shard once.")
    while len({tuple(part[-depth:]) for part in parts}) < len(files):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _path_in_command(command: str) -> str:
    """Return the last word of a command that ends in ``.tar``, else the command without what a name cannot hold."""
    words = re.findall(r"[^\s'\"|;&<>()=]+\.tar(?![^\s'\"|;&<>()])", command, re.IGNORECASE)
    return words[-1] if words else re.sub(r"[^\w.-]+", "-", command)[-64:].strip("-.")


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
            for part in pool.map(
                _hash_samples, [found[at : at + _HASHED_AT_ONCE] for at in range(0, size, _HASHED_AT_ONCE)]
            ):
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
