"""The samples that rows of embeddings were made from, found by shard and key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.exact import DoubleArray, IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, names_command, open_dataset, open_described
from clipcid_cli.formats.data.index import DataIndex
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.join import Keys, Listing, Values, join
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
    """
    indexes = WorkDirectory(settings.work).indexes
    if settings.data is not None:
        columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
        return open_dataset(settings.data, keys=settings.keys, columns=columns, index_root=indexes)
    if embeddings.sidecar is None or names_command(embeddings.sidecar.data.spec):
        return None
    return open_described(embeddings.sidecar.data, index_root=indexes)


def require_data(settings: BalanceSettings, embeddings: Embeddings, purpose: str) -> Dataset:
    """Open the data as :func:`open_data` does, for a purpose that needs it."""
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
    Embeddings of other tools do not record shards: all are then searched.
    """

    def __init__(self, data: Dataset) -> None:
        self._shards, self._index = data.shards, data.index
        self._numbers = {shard.name: number for number, shard in enumerate(data.shards)}
        self._last: tuple[int, dict[str, Sample]] | None = None
        self._all: dict[str, Sample] | None = None
        self._places: Values | None = None

    def find_rows(self, embeddings: Embeddings, numbers: IntArray) -> list[Sample | None]:
        """Find the samples of some rows of embeddings, int64 [n]; None for those that the data does not have."""
        shards, keys = (take_texts(embeddings, read, numbers) for read in (embeddings.shards_of, embeddings.keys_of))
        if self._index is None or not self.searches_all(shards):
            return self.find(shards, keys)
        if self._places is None:
            all_keys = partial(map, embeddings.keys_of, embeddings.files)
            self._places = _find_places(self._index, all_keys, embeddings.num_rows)
        return [_sample_at(self._index, place) for place in self._places[numbers].tolist()]

    def searches_all(self, shards: list[str]) -> bool:
        """Tell whether none of these is a shard of the data."""
        return self._numbers.keys().isdisjoint(shards)

    def find(self, shards: list[str], keys: list[str]) -> list[Sample | None]:
        """Find n samples; None for those that the data does not have."""
        if self._index is not None and self.searches_all(shards):
            different = list(dict.fromkeys(keys))
            column = pa.chunked_array([different], pa.string())
            places = dict(zip(different, _find_places(self._index, lambda: [column], len(different)), strict=True))
            return [_sample_at(self._index, places[key].tolist()) for key in keys]
        found = list[Sample | None]()
        for shard, run in groupby(zip(shards, keys, strict=True), key=itemgetter(0)):
            wanted, number = [key for _, key in run], self._numbers.get(shard)
            if self._index is None:
                samples = self._list_all() if number is None else self._list(number)
                found.extend(samples.get(key) for key in wanted)
            elif number is None:
                found.extend([None] * len(wanted))
            else:
                value_set = self._index.part(number).keys.combine_chunks()
                at = pc.index_in(pa.array(wanted, pa.string()), value_set=value_set).fill_null(-1)
                found.extend(_sample_at(self._index, (number, place)) for place in at.to_pylist())
        return found

    def _list(self, number: int) -> dict[str, Sample]:
        if self._last is None or self._last[0] != number:
            self._last = number, {sample.key: sample for sample in self._shards[number].samples()}
        return self._last[1]

    def _list_all(self) -> dict[str, Sample]:
        if self._all is None:
            self._all = {sample.key: sample for shard in self._shards for sample in shard.samples()}
        return self._all


def _find_places(index: DataIndex, keys: Keys, count: int) -> Values:
    """Find n different keys in the data: shard and place there of each, int64 [n, 2]; −1 for those it does not have."""

    def read() -> Iterator[tuple[pa.Array, Values]]:
        for number in range(len(index.shards)):
            part = index.part(number)
            places = np.arange(len(part))
            yield part.keys.combine_chunks(), np.stack([np.full_like(places, number), places], axis=1)

    return join(keys, count, Listing(index.folder, read, 2), index.folder)


def _sample_at(index: DataIndex, place: Sequence[int]) -> Sample | None:
    number, row = place
    return None if row < 0 else index.part(number).sample(row)


def read_thumbnails(finder: SampleFinder, shards: list[str], keys: list[str], side: int) -> list[tuple[str, str]]:
    """Return thumbnails as ``data:`` URLs, at most `side` pixels wide and high, and ""; or "" and why there is none."""
    found: list[Sample | None] | None = None
    if finder.searches_all(shards):  # once for all of them
        with suppress(ClipcidError, OSError):  # which each picture says again
            found = finder.find(shards, keys)
    pictures = []
    for number, (shard, key) in enumerate(zip(shards, keys, strict=True)):
        where = f"shard {shard}"
        try:
            sample = finder.find([shard], [key])[0] if found is None else found[number]
            if sample is None:
                pictures.append(("", f"the data has no image {key}."))
                continue
            where = sample.image.path
            picture = decode_image(sample.image.read(), draft_size=(side, side))
            pictures.append((thumbnail(picture, side), ""))
        except ClipcidError as error:
            pictures.append(("", error.message))
        except UnreadableImage as error:
            pictures.append(("", f"{where} has an {REASONS[error.reason]}, {key}."))
        except OSError as error:
            pictures.append(("", f"{error.filename or where} cannot be read: {describe(error)}."))
    return pictures


def open_for_sizes(settings: BalanceSettings, embeddings: Embeddings) -> Dataset | None:
    """Open the data for ``--select resolution`` where anything is to be chosen by it; else None."""
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
