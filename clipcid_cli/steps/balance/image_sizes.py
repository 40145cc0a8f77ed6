"""How many pixels images have, from their headers, for ``--select resolution``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from clipcid_cli.algorithms.search.distances import DoubleArray, IntArray
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.runtime.models.decode import UnreadableImage, read_size
from clipcid_cli.steps.balance.samples import SampleFinder, require_data
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings

_ROWS_AT_ONCE = 4096
_THREADS = 16


def count_pixels(settings: BalanceSettings, embeddings: Embeddings, rows: IntArray, reporter: Reporter) -> DoubleArray:
    """Read the sizes of some images.

    Args:
        settings: Settings of `balance`, which may name the data.
        embeddings: The embeddings of the images.
        rows: Rows of them, int64 [n], ascending.
        reporter: The listener.

    Returns:
        Width × height, float64 [n]; 0 where an image cannot be found or read.

    Raises:
        ClipcidError: when nothing says which data the embeddings were made of, or it cannot be opened.
    """
    finder = SampleFinder(require_data(settings, embeddings, "--select resolution"))
    pixels: DoubleArray = np.zeros(len(rows))
    with ThreadPoolExecutor(_THREADS) as pool, reporter.progress("image sizes", len(rows), "images") as progress:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = pa.array(rows[start : start + _ROWS_AT_ONCE])
            names = zip(embeddings.shards.take(part).to_pylist(), embeddings.keys.take(part).to_pylist(), strict=True)
            samples = [finder.find(shard, key) for shard, key in names]
            pixels[start : start + len(part)] = list(pool.map(_pixels, samples))
            progress.advance(len(part))
    missing = int(np.count_nonzero(pixels == 0))
    if missing:
        reporter.warn(f"The size of {missing:,} of {len(rows):,} images is not known; they are kept last.")
    return pixels


def _pixels(sample: Sample | None) -> int:
    if sample is None:
        return 0
    try:
        width, height = read_size(sample.image.read())
    except (OSError, UnreadableImage):
        return 0
    return width * height
