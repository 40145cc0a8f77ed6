"""The samples that rows of embeddings were made from, found by shard and key."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from clipcid_cli.algorithms.search.distances import DoubleArray, IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, names_command, open_dataset, open_described
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.results.kept_lists import is_uid
from clipcid_cli.runtime.models.decode import SkippedImage, read_size
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings

_ROWS_AT_ONCE = 4096
_THREADS = 16


def open_data(settings: BalanceSettings, embeddings: Embeddings) -> Dataset | None:
    """Open the data that was named, or else the data that the embeddings record.

    Returns:
        None when neither says which data it is, or it is the output of a recorded command, which is not run.

    Raises:
        ClipcidError: when it cannot be opened.
    """
    if settings.data is not None:
        columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
        return open_dataset(settings.data, keys=settings.keys, columns=columns)
    if embeddings.sidecar is None or "data" not in embeddings.sidecar:
        return None
    if names_command(embeddings.sidecar["data"]["spec"]):
        return None
    return open_described(embeddings.sidecar["data"])


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
    """Finds samples by shard and key. It caches the samples of one shard, so look-ups should be in the order of the rows."""

    def __init__(self, data: Dataset) -> None:
        self._shards = {shard.name: shard for shard in data.shards}
        self._last: tuple[str, dict[str, Sample]] | None = None
        self._all: dict[str, Sample] | None = None

    def find(self, shard: str, key: str) -> Sample | None:
        """Find a sample; None when the data has no such key.

        Args:
            shard: Name of its shard. Embeddings of other tools do not record it; then all shards are searched.
        """
        if shard not in self._shards:
            if self._all is None:
                self._all = {sample.key: sample for part in self._shards.values() for sample in part.samples()}
            return self._all.get(key)
        if self._last is None or self._last[0] != shard:
            self._last = shard, {sample.key: sample for sample in self._shards[shard].samples()}
        return self._last[1].get(key)

    def find_rows(self, embeddings: Embeddings, numbers: IntArray) -> list[Sample | None]:
        """Find the samples of some rows of embeddings, int64 [n]; None for those that the data does not have."""
        rows = pa.array(numbers)
        names = zip(embeddings.shards.take(rows).to_pylist(), embeddings.keys.take(rows).to_pylist(), strict=True)
        return [self.find(shard, key) for shard, key in names]


def count_pixels(settings: BalanceSettings, embeddings: Embeddings, rows: IntArray, reporter: Reporter) -> DoubleArray:
    """Read the sizes of some images.

    Args:
        rows: Rows of the embeddings, int64 [n], ascending.

    Returns:
        Width × height, float64 [n]; 0 where an image cannot be found or read.

    Raises:
        ClipcidError: when it is not known which data the embeddings were made from, or it cannot be opened.
    """
    finder = SampleFinder(require_data(settings, embeddings, "--select resolution"))
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
