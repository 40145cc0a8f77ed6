"""Shards: some thousands of samples that are read together, whatever they are stored in."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator

from clipcid_cli.formats.data.cells import Origin
from clipcid_cli.formats.data.parquet_shards import ImageTable, read_parquet
from clipcid_cli.formats.data.remote import describe_shard, is_remote
from clipcid_cli.formats.data.samples import MAX_SAMPLE_BYTES, TXT, Sample
from clipcid_cli.formats.data.tars import read_tar
from clipcid_cli.formats.fingerprint import FileRecord, stamp_of
from clipcid_cli.formats.skips import Skips
from clipcid_cli.shown import redact


class Slices(ABC):
    """Samples that are not in a tar: a folder of images, a list, a file of texts; in slices, small when pickled."""

    total: int | None = None
    """Number of samples, where that is known without reading them."""

    @property
    def origin(self) -> Origin | None:
        """The list or folder that names its images; None where it has none."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of slices."""

    @abstractmethod
    def read(self, number: int, skips: Skips) -> Iterator[Sample]:
        """Yield the samples of a slice, and count the rows that are none."""

    @abstractmethod
    def stamp(self, number: int) -> tuple[int, ...]:
        """Return numbers that change when a slice does."""

    @abstractmethod
    def fingerprint(self, number: int) -> tuple[int, str]:
        """Return the size of a slice and a hash of its content."""

    def forget(self) -> None:  # noqa: B027  # not all hold something
        """Give up what is held of the rows: it is read again when it is needed."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A tar of a webdataset, a parquet file of images, or a slice of a folder, a list or a file of texts.

    Picklable and small.
    """

    # Unique in the data set: a file's name without suffix, after folders where names repeat; a slice's number.
    name: str
    source: str  # the file, its URL, or a ``pipe:`` command whose output it is; the folder, list or file of texts
    slices: Slices | None = None  # what the slice of this number is one of; None of a file
    number: int = 0
    prefix_keys: bool = False  # whether keys begin with the shard's name
    # Whether each line of a ``.txt`` in a tar is a caption of its own, as in CLIP_benchmark's folders.
    caption_lines: bool = False
    caption_keys: tuple[str, ...] = ()  # where its captions are; empty where it is the usual place
    table: ImageTable | None = None  # the columns of a parquet file
    # What one file of a sample may have: samples with a larger one are counted in place of being read.
    max_sample_bytes: int = MAX_SAMPLE_BYTES
    is_cut: bool = False  # whether its tar ends too early, and the samples before the end are used

    @property
    def is_tar(self) -> bool:
        return self.slices is None and self.table is None

    @property
    def is_streamed(self) -> bool:
        """Whether samples come with their bytes while it is read, since one by one they are far away or compressed."""
        return is_remote(self.file) or self.table is not None

    @property
    def member_keys(self) -> tuple[str, ...]:
        """Where the captions of a tar are."""
        return self.caption_keys or (TXT,)

    @property
    def file(self) -> str:
        """The file its samples are in, as their locations name it; empty where each image is a file of its own."""
        return self.source if self.slices is None else ""

    def describe(self, key: str) -> str:
        """Name a sample for a person: by its key, in a file with the file's name before it."""
        return key if self.slices is not None or self.prefix_keys else f"{self.name}/{key}"

    def locate(self, skips: Skips) -> Skips:
        """Return skipped samples of this shard, each listed by its own key and the shard, not by its name for a person."""
        listed = [sample if sample[1] else (self._key_of(sample[0]), self.name, sample[2]) for sample in skips.listed]
        return dataclasses.replace(skips, listed=listed)

    def _key_of(self, name: str) -> str:
        """Return the key of a sample that `describe` names, or a reader, which knows of no prefix."""
        prefix = f"{self.name}/"
        own = name.removeprefix(prefix) if self.slices is None or self.prefix_keys else name
        return f"{prefix}{own}" if self.prefix_keys else own

    def samples(self, skips: Skips | None = None) -> list[Sample]:
        """List its samples as `stream` yields them, without the bytes of their images."""
        return [sample.without_image_data() for sample in self.stream(skips)]

    def stream(self, skips: Skips | None = None) -> Iterator[Sample]:
        """Yield its samples in order while it is read; those of a shard that is streamed come with their bytes.

        Samples without an image, and those with a key that occurs earlier, are omitted and counted in `skips`.
        """
        skips = Skips() if skips is None else skips
        if self.slices is not None:
            found = self.slices.read(self.number, skips)
        elif self.table is not None:
            found = read_parquet(self.source, self.name, self.table, skips, self.max_sample_bytes)
        else:
            found = read_tar(
                self.source,
                self.name,
                skips,
                self.member_keys,
                caption_lines=self.caption_lines,
                max_bytes=self.max_sample_bytes,
                allow_cut=self.is_cut,
            )
        for sample in found:
            yield dataclasses.replace(sample, key=f"{self.name}/{sample.key}") if self.prefix_keys else sample

    def fingerprint(self) -> FileRecord:
        if self.slices is not None:
            return FileRecord(f"{redact(self.source)}#{self.name}", *self.slices.fingerprint(self.number))
        return describe_shard(self.source)

    def stamp(self) -> tuple[int, ...]:
        """Return numbers that change when the shard does: those of `stamp_of`, of which the first is the size.

        Zeros for one that is gone or behind a URL, which is not asked for at each start.
        """
        if self.slices is not None:
            return self.slices.stamp(self.number)
        try:
            return stamp_of(os.stat(self.source))
        except OSError:
            return 0, 0, 0, 0


def cut(
    slices: Slices, source: str, *, prefix_keys: bool = False, max_sample_bytes: int = MAX_SAMPLE_BYTES
) -> tuple[Shard, ...]:
    """Return slices as shards."""
    return tuple(
        Shard(f"{number:05d}", source, slices, number, prefix_keys, max_sample_bytes=max_sample_bytes)
        for number in range(len(slices))
    )
