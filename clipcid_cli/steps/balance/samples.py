"""The samples that rows of embeddings were made from, found by shard and key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.search.distances import DoubleArray, IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, names_command, open_dataset, open_described
from clipcid_cli.formats.data.index import DataIndex
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.key_join import KeyIndex
from clipcid_cli.formats.reading import describe
from clipcid_cli.formats.report import thumbnail
from clipcid_cli.formats.results.kept_lists import is_uid
from clipcid_cli.formats.skips import REASONS
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.decode import SkippedImage, UnreadableImage, decode_image, read_size
from clipcid_cli.steps.balance.rows import take_texts
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings

_ROWS_AT_ONCE = 4096
_THREADS = 16


def open_data(settings: BalanceSettings, embeddings: Embeddings) -> Dataset | None:
    """Open the data that was named, or else the data that the embeddings record, with its index where there is one.

    Returns:
        None when neither says which data it is, or it is the output of a recorded command, which is not run.

    Raises:
        ClipcidError: when it cannot be opened.
    """
    indexes = WorkDirectory(settings.work).indexes
    if settings.data is not None:
        columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
        return open_dataset(settings.data, keys=settings.keys, columns=columns, index_root=indexes)
    if embeddings.sidecar is None or names_command(embeddings.sidecar.data.spec):
        return None
    return open_described(embeddings.sidecar.data, index_root=indexes)


def require_data(settings: BalanceSettings, embeddings: Embeddings, purpose: str) -> Dataset:
    """Open the data as :func:`open_data` does, for a purpose that needs it.

    Raises:
        ClipcidError: also when it is not known which data it is.
    """
    data = open_data(settings, embeddings)
    if data is None:
        raise ClipcidError(
            f"{purpose} needs the data itself, and {embeddings.folder} does not record which data it was made from.",
            "Give the data as the first argument: clipcid balance DATA …",
        )
    return data


def read_uid(sample: Sample | None) -> str | None:
    """Read ``uid`` from a sample's attributes, where img2dataset stores it; None where there is none."""
    if sample is None or sample.attributes is None:
        return None
    try:
        attributes: Any = json.loads(sample.attributes.read())
    except (OSError, ValueError):
        return None
    uid = attributes.get("uid") if isinstance(attributes, dict) else None
    return str(uid) if is_uid(uid) else None


class SampleFinder:
    """Finds samples by shard and key, in the index of the data where there is one.

    Without an index it lists shards and caches the samples of one, so look-ups should be in the order of the rows.
    """

    def __init__(self, data: Dataset) -> None:
        self._shards, self._index = data.shards, data.index
        self._numbers = {shard.name: number for number, shard in enumerate(data.shards)}
        self._last: tuple[int, dict[str, Sample]] | None = None
        self._all: dict[str, Sample] | None = None
        self._key_index: KeyIndex | None = None

    def find(self, shard: str, key: str) -> Sample | None:
        """Find a sample; None when the data has no such key.

        Args:
            shard: Name of its shard. Embeddings of other tools do not record it; then all shards are searched.
        """
        return self.find_all([shard], [key])[0]

    def find_rows(self, embeddings: Embeddings, numbers: IntArray) -> list[Sample | None]:
        """Find the samples of some rows of embeddings, int64 [n]; None for those that the data does not have."""
        shards, keys = (take_texts(embeddings, read, numbers) for read in (embeddings.shards_of, embeddings.keys_of))
        return self.find_all(shards, keys)

    def find_all(self, shards: list[str], keys: list[str]) -> list[Sample | None]:
        """Find n samples, each as :meth:`find` does."""
        found = list[Sample | None]()
        for shard, run in groupby(zip(shards, keys, strict=True), key=itemgetter(0)):
            wanted, number = [key for _, key in run], self._numbers.get(shard)
            if self._index is None:
                samples = self._list_all() if number is None else self._list(number)
                found.extend(samples.get(key) for key in wanted)
            elif number is None:
                found.extend(self._find_anywhere(self._index, wanted))
            else:
                part = self._index.part(number)
                places = pc.index_in(pa.array(wanted, pa.string()), value_set=part.keys.combine_chunks()).to_pylist()
                found.extend(None if at is None else part.sample(at, self._shards[number]) for at in places)
        return found

    def _find_anywhere(self, index: DataIndex, keys: list[str]) -> Iterator[Sample | None]:
        if self._key_index is None:
            parts = (index.part(number).keys for number in range(len(index.shards)))
            self._key_index = KeyIndex(
                pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string())
            )
        ends = np.cumsum(index.sizes)
        for row in self._key_index.find(keys).tolist():
            number = int(np.searchsorted(ends, row, side="right"))
            yield None if row < 0 else index.sample(number, row - int(ends[number] - index.sizes[number]))

    def _list(self, number: int) -> dict[str, Sample]:
        if self._last is None or self._last[0] != number:
            self._last = number, {sample.key: sample for sample in self._shards[number].samples()}
        return self._last[1]

    def _list_all(self) -> dict[str, Sample]:
        if self._all is None:
            self._all = {sample.key: sample for shard in self._shards for sample in shard.samples()}
        return self._all


def read_thumbnail(finder: SampleFinder, shard: str, key: str, side: int) -> tuple[str, str]:
    """Return a thumbnail as a ``data:`` URL, at most `side` pixels wide and high, and ""; or "" and why there is none."""
    where = f"shard {shard}"
    try:
        sample = finder.find(shard, key)
        if sample is None:
            return "", f"the data has no image {key}."
        where = sample.image.path
        return thumbnail(decode_image(sample.image.read(), draft_size=(side, side)), side), ""
    except ClipcidError as error:
        return "", error.message
    except UnreadableImage as error:
        return "", f"{where} has an {REASONS[error.reason]}, {key}."
    except OSError as error:
        return "", f"{error.filename or where} cannot be read: {describe(error)}."


def open_for_sizes(settings: BalanceSettings, embeddings: Embeddings) -> Dataset | None:
    """Open the data for ``--select resolution`` where anything is to be chosen by it; else None.

    Raises:
        ClipcidError: when it is not known which data the embeddings were made from, or it cannot be opened.
    """
    if settings.select != "resolution" or (settings.keep == 1.0 and settings.max_per_cluster is None):
        return None
    return require_data(settings, embeddings, "--select resolution")


def count_pixels(data: Dataset, embeddings: Embeddings, rows: IntArray, reporter: Reporter) -> DoubleArray:
    """Read the sizes of some images.

    Args:
        data: What the embeddings were made from.
        rows: Rows of the embeddings, int64 [n], ascending.

    Returns:
        Width × height, float64 [n]; 0 where an image cannot be found or read.
    """
    finder = SampleFinder(data)
    pixels: DoubleArray = np.zeros(len(rows))
    with ThreadPoolExecutor(_THREADS) as pool, reporter.progress("image sizes", len(rows), "images") as progress:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            samples = finder.find_rows(embeddings, rows[start : start + _ROWS_AT_ONCE])
            pixels[start : start + len(samples)] = list(pool.map(_pixels, samples))
            progress.advance(len(samples))
    missing = int(np.count_nonzero(pixels == 0))
    if missing:
        reporter.warn(f"The size of {missing:,} of {len(rows):,} images is unknown; they are kept last.")
    return pixels


def _pixels(sample: Sample | None) -> int:
    if sample is None:
        return 0
    size = read_size(sample.image)
    return 0 if isinstance(size, SkippedImage) else size[0] * size[1]
