"""The samples that rows of embeddings were made from, found by shard and key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.captions import parse_json
from clipcid_cli.formats.data.dataset import Dataset, names_command, open_described
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.manifest import validate_embedded
from clipcid_cli.formats.embeddings.rows import EmbeddingFile
from clipcid_cli.formats.results.keep_list import is_uid
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps.data_index import index_alone, open_part
from clipcid_cli.steps.open_data import open_named
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from clipcid_cli.formats.join import Keys, Values


def open_data(settings: BalanceSettings, embeddings: Embeddings) -> Dataset | None:
    """Open the data that was named, or else what :func:`open_recorded` opens."""
    if settings.data is None:
        return open_recorded(settings, embeddings)
    return open_named(settings, settings.data, WorkDirectory(settings.work).indexes)


def open_recorded(settings: BalanceSettings, embeddings: Embeddings) -> Dataset | None:
    """Open the data that embeddings record as :func:`open_as_it_is` does, and refuse shards that have changed."""
    data = open_as_it_is(settings, embeddings)
    if data is not None:
        validate_embedded(embeddings.folder, data)
    return data


def open_as_it_is(settings: BalanceSettings, embeddings: Embeddings) -> Dataset | None:
    """Open the data that embeddings record; None when they do not, or it is the output of a command, which is not run."""
    if embeddings.sidecar is None or names_command(embeddings.sidecar.data.spec):
        return None
    return open_described(embeddings.sidecar.data, WorkDirectory(settings.work).indexes, **settings.trust)


def validate_data(settings: BalanceSettings, embeddings: Embeddings, purpose: str) -> Dataset:
    """Open the data as :func:`open_data` does, for a purpose that needs it."""
    data = open_data(settings, embeddings)
    if data is None:
        raise ClipcidError(
            f"{purpose} needs the data itself, and {embeddings.folder} does not record which data it was made from.",
            "Give the data as the first argument: clipcid balance DATA …",
        )
    return data


def validate_data_there(settings: BalanceSettings, embeddings: Embeddings) -> None:
    """Check that the data is there where ``--select resolution`` reads it; what is finished needs none."""
    if settings.reads_sizes:
        validate_data(settings, embeddings, "--select resolution")


def read_uid(sample: Sample | None) -> str | None:
    """Read ``uid`` from a sample's attributes, where img2dataset stores it; None where there is none."""
    if sample is None or sample.attributes is None:
        return None
    try:
        attributes = parse_json(sample.attributes.read())
    except OSError:
        return None
    uid = attributes.get("uid") if isinstance(attributes, dict) else None
    return str(uid) if is_uid(uid) else None


def take_texts(
    embeddings: Embeddings, read: Callable[[EmbeddingFile], pa.ChunkedArray], numbers: IntArray
) -> list[str]:
    """Read a column of strings at rows in any order; n strings."""
    order = np.argsort(numbers, kind="stable")
    texts = np.empty(len(numbers), object)
    texts[order] = pa.chunked_array(embeddings.take_column(read, numbers[order]), pa.large_string()).to_pylist()
    return list(texts)


class SampleFinder:
    """Finds samples by shard and key in the index of the data, on one process; their captions are not read.

    Shards that are not in it are listed into it: those asked for, or all of them for embeddings of other tools, which do not
    record shards.
    """

    def __init__(self, data: Dataset, workers: int | None) -> None:
        self._data = data
        self._workers = workers
        self._numbers = {shard.name: index for index, shard in enumerate(data.shards)}
        self._part = lru_cache(maxsize=1)(lambda index: open_part(self._data, index))
        self._places: Values | None = None

    def searches_all(self, shards: list[str]) -> bool:
        """Tell whether none of these is a shard of the data."""
        return self._numbers.keys().isdisjoint(shards)

    def find_rows(self, embeddings: Embeddings, numbers: IntArray) -> list[Sample | None]:
        """Find the samples of some rows of embeddings, int64 [n]; None for those that the data does not have."""
        shards, keys = (take_texts(embeddings, read, numbers) for read in (embeddings.shards_of, embeddings.keys_of))
        if not self.searches_all(shards):
            return self.find(shards, keys)
        if self._places is None:
            self._places = self._find_places(partial(map, embeddings.keys_of, embeddings.files), embeddings.num_rows)
        return self._samples_at(self._places[numbers])

    def find(self, shards: list[str], keys: list[str]) -> list[Sample | None]:
        """Find n samples; None for those that the data does not have."""
        if self.searches_all(shards):
            codes, different = pd.factorize(np.array(keys, object))
            column = pa.chunked_array([different], pa.string())
            return self._samples_at(self._find_places(lambda: [column], len(different))[codes])
        samples = list[Sample | None]()
        for shard, run in groupby(zip(shards, keys, strict=True), key=itemgetter(0)):
            wanted = [key for _, key in run]
            index = self._numbers.get(shard)
            if index is None:
                samples.extend([None] * len(wanted))
                continue
            rows = pc.index_in(pa.array(wanted, pa.string()), value_set=self._part(index).keys.combine_chunks())
            places = np.stack([np.full(len(wanted), index), rows.fill_null(-1).to_numpy()], axis=1)
            samples.extend(self._samples_at(places))
        return samples

    def _find_places(self, keys: Keys, count: int) -> Values:
        """Find n different keys in the data: shard and place there of each, int64 [n, 2]; −1 for those it does not have."""
        from clipcid_cli.formats.join import Listing, join

        self._data = index_alone(self._data, self._workers)
        index = self._data.index
        assert index is not None  # it has just been made

        def read() -> Iterator[tuple[pa.Array, Values]]:
            for shard in range(len(index.shards)):
                part = index.part(shard)
                places = np.arange(len(part))
                yield part.keys.combine_chunks(), np.stack([np.full_like(places, shard), places], axis=1)

        return join(keys, count, Listing(index.folder, read, 2), index.folder)

    def _samples_at(self, places: Values) -> list[Sample | None]:
        return [None if row < 0 else self._part(shard).sample(row, captions=False) for shard, row in places.tolist()]
