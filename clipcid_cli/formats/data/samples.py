"""Samples of image-text data: where their bytes are, and which captions are in them."""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from glob import glob
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import parse_npy
from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.files import open_descriptor, read_part, read_regular, validate_size
from clipcid_cli.formats.skips import Skips

if TYPE_CHECKING:
    from clipcid_cli.formats.data.cells import Origin
    from clipcid_cli.formats.data.shard_cache import ShardCopy

# Suffixes of images; of several in one sample the first in this order is taken (open_clip's, then others that Pillow reads).
IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")

_OPEN_FILES = 64

_VECTOR = "a vector with a 1 for each class the image has and 0 for the others."

MAX_SAMPLE_BYTES = 64 * 2**20
"""Bytes that one file of a sample may have, unless ``--max-sample-bytes`` says otherwise."""

MOST_TEXT = 2**22
"""Bytes of a file of captions or attributes; of a longer one no more is read."""

LONGEST_CAPTION = 8_192
"""Characters of a caption; a tokenizer reads no more of one."""

_MOST_CAPTIONS = 1_000  # of an image, by each key
_MOST_OF_CELL = 4 * LONGEST_CAPTION + 1  # characters, or bytes, so that what is too long for a caption stays so

TXT = "txt"
"""Key of the captions of a tar where no other is given."""

JSON = "json"
"""Extension of the member with attributes, whose fields may be captions."""

_FIELD = f"{JSON}:"  # before the name of a field of the json member


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of a list's columns, or of a parquet file's with images; an optional ``label`` column numbers the classes.

    Where any cell of that column contains several numbers (a parquet list, or ``3 7`` in text), every image may have
    any number of classes, and an empty cell means none.
    """

    image: str = "filepath"  # see `cells.Origin`
    caption: str = "title"  # in parquet perhaps a list of several; optional
    key: str = "key"  # without such a column, the path as written

    def required(self, caption_keys: Sequence[str]) -> list[str]:
        """Name the columns that must exist: columns of captions, and columns that the user renamed."""
        renamed = ((self.caption, Columns.caption), (self.key, Columns.key))
        return [*caption_keys, *(name for name, default in renamed if name != default)]


@dataclasses.dataclass(frozen=True)
class ListFormat:
    """How a list is read where that is not found out: None."""

    root: str | None = None  # the folder of relative paths; else that of the list
    separator: str | None = None  # of the cells of a text
    encoding: str | None = None  # of a text


@dataclasses.dataclass(frozen=True, slots=True)
class ByteRange:
    """Where the bytes of an image or of an attributes file are stored."""

    path: str  # a local file, a URL that fsspec knows, or a ``pipe:`` command; empty where there is none
    offset: int = 0  # of a parquet file the number of a row
    size: int | None = None  # number of bytes; None for a whole file
    # The bytes themselves, where they came with a stream.
    data: bytes | None = dataclasses.field(default=None, compare=False, repr=False)
    # Local copy of a file behind a URL, or of the images of a parquet file, to read from.
    copy: ShardCopy | None = dataclasses.field(default=None, compare=False, repr=False)
    column: str | None = None  # that of the images in a parquet file
    max_bytes: int = dataclasses.field(default=MAX_SAMPLE_BYTES, compare=False, repr=False)
    # The list or folder that named it, where that is no file of the data itself.
    origin: Origin | None = dataclasses.field(default=None, compare=False, repr=False)

    def read(self) -> bytes:
        """Read the bytes; an OSError where the file is missing or has become shorter.

        A TooManyBytesError, which is an OSError too, where there are more than `max_bytes`: they are not read.
        Commands are never run here: a path may come from a file that someone else wrote.
        """
        problem = "" if self.origin is None else self.origin.why_refused(self.path)
        if problem:  # an index may be someone else's, too
            raise OSError(f"{self.path}{problem}")
        if self.size is not None:
            validate_size(self.path, self.size, self.max_bytes)
        if self.data is not None:
            return self.data
        if self.copy is not None or self.column is not None or is_remote(self.path):
            from clipcid_cli.formats.data.distant import read_distant  # none of it is needed for files of this disk

            return read_distant(self)
        if self.size is None:
            return read_regular(self.path, self.max_bytes)
        return read_part(_open_kept(self.path).fd, self.path, self.offset, self.size)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One image with its captions and classes; of a file of texts, a text alone."""

    key: str  # its name, unique in the data set
    image: ByteRange
    captions: tuple[str, ...] = ()
    label: int | None = None
    labels: tuple[int, ...] | None = None  # numbers of its classes, none or several, where a list says so
    # Its vector of classes, a ``.npy`` with a 1 for each, as in CLIP_benchmark's multilabel folders.
    multi_hot: ByteRange | None = None
    attributes: ByteRange | None = None
    # Where its captions are, by each key, None where it has none; empty where they cannot be read from there again.
    captions_at: tuple[ByteRange | None, ...] = ()

    def without_image_data(self) -> Sample:
        """Return the sample without the bytes of its image, where they came with a stream: they are most of it."""
        if self.image.data is None:
            return self
        return dataclasses.replace(self, image=dataclasses.replace(self.image, data=None))


def read_classes(sample: Sample, num_classes: int) -> tuple[int, ...] | None:
    """Return the numbers of a sample's classes in [0, `num_classes`), ascending, none or more; None where nothing says."""
    if sample.multi_hot is not None:
        return tuple(np.flatnonzero(_read_vector(sample, num_classes)).tolist())
    classes = sample.labels
    if classes is None:
        if sample.label is None:
            return None
        classes = (sample.label,)
    wrong = next((label for label in classes if not 0 <= label < num_classes), None)
    if wrong is not None:
        raise ClipcidError(
            f"Sample {sample.key} has class {wrong}; there are {num_classes} class names (0 … {num_classes - 1}).",
            "Give the matching list of class names with --classnames.",
        )
    return tuple(sorted(classes))


def read_vector_length(sample: Sample) -> int:
    """Read the length of a sample's vector, the number of classes."""
    return len(_read_vector(sample, None))


def _read_vector(sample: Sample, length: int | None) -> npt.NDArray[Any]:
    """Read a vector of zeros and ones, of any length where `length` is None."""
    assert sample.multi_hot is not None
    try:
        vector = parse_npy(sample.multi_hot.read())
    except (OSError, ValueError) as error:
        raise ClipcidError(f"The .npy of sample {sample.key} cannot be read: {error}.", f"Write {_VECTOR}") from error
    if vector.ndim != 1 or length not in (None, len(vector)) or not np.isin(vector, (0, 1)).all():
        wanted = "a vector of zeros and ones" if length is None else f"zeros and ones for {length} classes"
        raise ClipcidError(
            f"The .npy of sample {sample.key} is {vector.dtype} {list(vector.shape)}, not {wanted}.",
            ("Write " if length is None else "Give the matching list of class names with --classnames, or write ")
            + _VECTOR,
        )
    return vector


def read_metadata(sample: Sample, place: int) -> int:
    """Return one number, 0 or more, of the vector of metadata that a sample has in its ``.npy``, as of WILDS."""
    try:
        if sample.multi_hot is None:
            raise ValueError("it has none")
        numbers = parse_npy(sample.multi_hot.read())
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or not 0 <= numbers[place] < 2**31:
            raise ValueError(f"it is {numbers.dtype} {list(numbers.shape)}")
    except (OSError, ValueError, IndexError) as error:
        raise ClipcidError(
            f"The .npy of sample {sample.key}, of which number {place} is its group, cannot be read: {error}.",
            "Get the copy of the data set that DataComp evaluates: its shards have a .npy beside each image.",
        ) from error
    return int(numbers[place])


def natural_key(text: str) -> tuple[object, ...]:
    """Sort key by which ``2.tar`` comes before ``10.tar``; the text itself decides between ``01`` and ``1``."""
    return tuple(int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", text))), text


def match_pattern(pattern: str) -> list[str]:
    """Return the paths that a pattern matches, 2 before 10; the pattern itself where it is a path or matches none."""
    if os.path.lexists(pattern):
        return [pattern]
    return sorted(glob(os.path.expanduser(pattern)), key=natural_key) or [pattern]


class Handle:
    """A descriptor of an open file, closed when nothing holds it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


@lru_cache(maxsize=_OPEN_FILES)
def _open_kept(path: str) -> Handle:
    return Handle(open_descriptor(path))


def member_of(key: str) -> str:
    """Return the extension of the member that holds the captions of a key."""
    return JSON if key.startswith(_FIELD) else key.lower()


def split_captions(
    content: bytes, key: str = TXT, *, a_line_each: bool = False, skips: Skips | None = None
) -> tuple[str, ...]:
    """Return the captions in a member: a field of a json; else all of its text, or one caption a line.

    Args:
        content: More than `MOST_TEXT` bytes are cut off; of a json that is too long there is no caption.
        skips: Counts captions that are not used as they are stored.
    """
    skips = Skips() if skips is None else skips
    if key.startswith(_FIELD):
        fields = parse_json(content)
        return clean_captions(fields.get(key.removeprefix(_FIELD)) if isinstance(fields, dict) else None, skips)
    text = _decode(content, skips).removeprefix("\ufeff").strip()
    if a_line_each:
        if len(content) > MOST_TEXT:
            skips.change("cut")
        return clean_captions(text.splitlines(), skips)
    if "\n" in text:
        skips.change("several_lines")
    return _limit((text,), skips) if text else ()


def parse_json(content: bytes) -> Any:
    """Return what a json member says; None where it is none, has more than `MOST_TEXT` bytes, or nests too deeply."""
    try:
        return json.loads(content) if len(content) <= MOST_TEXT else None
    except (ValueError, RecursionError):
        return None


def clean_captions(value: Any, skips: Skips) -> tuple[str, ...]:
    """Return the captions in a value of a field or cell: a text or several; of anything else none."""
    texts: Iterable[Any] = [value] if isinstance(value, str | bytes) else value if isinstance(value, Sequence) else ()
    cleaned = (_clean(text, skips) for text in texts if isinstance(text, str | bytes))
    captions = tuple(islice(filter(None, cleaned), _MOST_CAPTIONS + 1))
    if count := sum("\n" in caption for caption in captions):
        skips.change("several_lines", count)
    return _limit(captions, skips)


def _limit(captions: Sequence[str], skips: Skips) -> tuple[str, ...]:
    """Return captions, neither too many nor too long for a model; captions that are left out or cut are counted."""
    if len(captions) <= _MOST_CAPTIONS and max(map(len, captions), default=0) <= LONGEST_CAPTION:
        return tuple(captions)
    skips.change("cut", max(1, sum(len(caption) > LONGEST_CAPTION for caption in captions)))
    return tuple(caption[:LONGEST_CAPTION] for caption in captions[:_MOST_CAPTIONS])


def cut_cell(cell: Any) -> Any:
    """Return a cell of a parquet file without most of what `clean_captions` would cut off; the rest tells it to count."""
    if isinstance(cell, str | bytes):
        return cell[:_MOST_OF_CELL]
    return [cut_cell(part) for part in cell[: _MOST_CAPTIONS + 1]] if isinstance(cell, list) else cell


def _decode(content: bytes, skips: Skips) -> str:
    """Return the text of UTF-8 bytes, whatever else is among them replaced and counted."""
    is_whole = len(content) <= MOST_TEXT
    try:
        return codecs.utf_8_decode(content[:MOST_TEXT], "strict", is_whole)[0]  # a letter may be cut in two
    except UnicodeDecodeError:
        skips.change("not_utf8")
        return content[:MOST_TEXT].decode("utf-8", errors="replace")


def _clean(text: str | bytes, skips: Skips) -> str:
    """Return a text without space around it, half characters, as JSON may hold, replaced: tokenizers fail on those."""
    if isinstance(text, bytes):  # of a column that is not marked as text
        text = _decode(text, skips)
    return (text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")).strip()


def read_cell(cell: Any) -> str:
    """Return the text of a cell, without what is too long for any; empty where it has none."""
    return "" if cell is None else str(cell)[:_MOST_OF_CELL].strip()


def gather_captions(keys: Sequence[str], by_key: Sequence[Sequence[str]], skips: Skips) -> tuple[str, ...]:
    """Return all captions of a sample, key by key; keys without a caption are counted."""
    for key, captions in zip(keys, by_key, strict=True):
        if not captions:
            skips.miss(key)
    return tuple(chain.from_iterable(_limit(captions, skips) for captions in by_key))
