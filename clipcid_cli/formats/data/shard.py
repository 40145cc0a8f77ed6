"""Shards: some thousands of samples that are read together. Each kind of data has its own, in a module of its own.

tar_shards.py       tars of a webdataset, also behind URLs and from commands
parquet_shards.py   parquet files with the images in them
slices.py           slices of a folder of images or of a list
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from clipcid_cli.formats.data.addresses import is_remote
from clipcid_cli.formats.data.opening import describe_shard
from clipcid_cli.formats.data.samples import MAX_SAMPLE_BYTES, ByteRange, Columns, ListFormat, Sample
from clipcid_cli.formats.fingerprint import FileRecord, stamp_of
from clipcid_cli.formats.skips import Skips

if TYPE_CHECKING:
    from clipcid_cli.formats.data.cells import Origin


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How the user wants data to be read; see `open_dataset`."""

    prefix_keys: bool = False
    columns: Columns = dataclasses.field(default_factory=Columns)
    caption_lines: bool = False
    caption_keys: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    list_format: ListFormat = dataclasses.field(default_factory=ListFormat)


class Opened(NamedTuple):
    """The shards of a data set, and the names of its classes where it has any."""

    kind: str  # see `Dataset`
    shards: Sequence[Shard]
    classes: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Shard(ABC):
    """A source of samples: small when pickled, and read where it is needed."""

    # Unique in the data set: a file's name without suffix, after folders where names repeat; the number of a slice.
    name: str
    source: str  # the file, its URL, or a ``pipe:`` command whose output it is; the folder or list of a slice
    prefix_keys: bool = False  # whether keys begin with the shard's name
    # What one file of a sample may have: samples with a larger one are counted in place of being read.
    max_sample_bytes: int = MAX_SAMPLE_BYTES

    @abstractmethod
    def _read_own(self, skips: Skips) -> Iterator[Sample]:
        """Yield the samples in order, by their keys in the shard; count those that are left out."""

    def find_cut(self) -> str:
        """Check that the file is whole, other damage than a truncated tar being an error; return how that is truncated."""
        return ""

    def read_captions(self, places: Sequence[ByteRange | None]) -> tuple[str, ...]:
        """Read the captions of a sample again from where `Sample.captions_at` says they are."""
        raise NotImplementedError("the captions of these shards are in the index")

    def estimate_samples(self) -> int:
        """Estimate how many samples there are."""
        return len(self.samples())

    def column_names(self) -> list[str]:
        """Return the names of the columns of a list; of other data none."""
        return []

    def forget(self) -> None:  # noqa: B027  # not all hold something
        """Give up what is held of the samples: it is read again when it is needed."""

    @property
    def file(self) -> str:
        """The file its samples are in, as their locations name it; empty where each image is a file of its own."""
        return self.source

    @property
    def is_streamed(self) -> bool:
        """Whether samples come with their bytes while it is read, since one by one they are far away or compressed."""
        return is_remote(self.file)

    @property
    def image_column(self) -> str | None:
        """The column of the images in a parquet file."""
        return None

    @property
    def origin(self) -> Origin | None:
        """The list or folder that names its images, where each is a file of its own."""
        return None

    def describe(self, key: str) -> str:
        """Name a sample for a person: by its key, in a file with the file's name before it."""
        return f"{self.name}/{key}" if self.file and not self.prefix_keys else key

    def locate(self, skips: Skips) -> Skips:
        """Return skipped samples of this shard, each listed by its own key and the shard, not by its name for a person."""
        if not skips.listed:
            return skips
        listed = [sample if sample[1] else (self._key_of(sample[0]), self.name, sample[2]) for sample in skips.listed]
        return dataclasses.replace(skips, listed=listed)

    def _key_of(self, name: str) -> str:
        """Return the key of a sample that `describe` names, or a reader, which knows of no prefix."""
        prefix = f"{self.name}/"
        own = name.removeprefix(prefix) if self.file or self.prefix_keys else name
        return f"{prefix}{own}" if self.prefix_keys else own

    def samples(self, skips: Skips | None = None) -> list[Sample]:
        """List its samples as `stream` yields them, without the bytes of their images."""
        return [sample.without_image_data() for sample in self.stream(skips)]

    def stream(self, skips: Skips | None = None) -> Iterator[Sample]:
        """Yield its samples in order while it is read; those of a shard that is streamed come with their bytes.

        Samples without an image, and those with a key that occurs earlier, are omitted and counted in `skips`.
        """
        samples = self._read_own(Skips() if skips is None else skips)
        if not self.prefix_keys:
            return samples
        return (dataclasses.replace(sample, key=f"{self.name}/{sample.key}") for sample in samples)

    def fingerprint(self) -> FileRecord:
        """Describe its content for a sidecar."""
        return describe_shard(self.source)

    def stamp(self) -> tuple[int, ...]:
        """Return numbers that change when the shard does: those of `stamp_of`, of which the first is the size.

        Zeros for one that is gone or behind a URL, which is not asked for at each start.
        """
        try:
            return stamp_of(os.stat(self.source))
        except OSError:
            return 0, 0, 0, 0
