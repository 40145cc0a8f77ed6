"""The rules of ``--select`` that score each image by itself: by place, chance, caption or size."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clipcid_cli.algorithms.near.exact import DoubleArray, IntArray
from clipcid_cli.algorithms.sets.representatives import random_scores
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.models.decode import read_size
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.captions import compare_captions, have_captions
from clipcid_cli.steps.balance.samples import SampleFinder, take_texts, validate_data
from clipcid_cli.steps.reporting import Progress

# Images whose sizes are looked up together, and threads that read them.
_ROWS_AT_ONCE = 4096
_THREADS = 16


def _random(run: BalanceRun, rows: IntArray) -> DoubleArray:
    if run.rows.is_searched is not None:  # by the place among the rows that filters have left
        rows = np.cumsum(run.rows.is_searched)[rows] - 1
    return random_scores(rows, run.settings.seed)


def _similarity(run: BalanceRun, rows: IntArray) -> DoubleArray:
    """Return the similarity of images to their captions.

    It is −inf where there is no caption, or its embedding is zero or not finite; the latter are counted in a warning.
    """
    embeddings, numbers = run.embeddings, run.rows.numbers[rows]
    similarity = compare_captions(embeddings, numbers, Progress()).astype(np.float64)
    unusable = numbers[np.isnan(similarity)]
    captioned = unusable[have_captions(embeddings, unusable)]
    skips = Skips.of(dict.fromkeys(take_texts(embeddings, embeddings.keys_of, captioned), "nan_row"))
    if skips.total:
        reporting.warn(
            f"{skips.total:,} text embeddings of images in sets are zero or not finite: such an image is kept only where "
            f"no other image of its set has a usable one.\n{skips.describe()}"
        )
    return np.nan_to_num(similarity, nan=-np.inf)


def _resolution(run: BalanceRun, rows: IntArray) -> DoubleArray:
    """Return width × height of images; 0 where one cannot be found or read."""
    data = validate_data(run.settings, run.embeddings, "--select resolution")
    finder = SampleFinder(data, run.settings.workers)
    numbers = run.rows.numbers[rows]
    pixels = np.zeros(len(rows))
    with ThreadPoolExecutor(_THREADS) as pool, reporting.progress("image sizes", len(rows), "images") as progress:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            samples = finder.find_rows(run.embeddings, numbers[start : start + _ROWS_AT_ONCE])
            pixels[start : start + len(samples)] = list(pool.map(_pixels, samples))
            progress.advance(len(samples))
    missing = int(np.count_nonzero(pixels == 0))
    if missing:
        reporting.warn(f"The size of {missing:,} of {len(rows):,} images is unknown; they are kept last.")
    return pixels


def _pixels(sample: Sample | None) -> int:
    size = None if sample is None else read_size(sample.image)
    return math.prod(size) if isinstance(size, tuple) else 0


SCORES: dict[str, Callable[[BalanceRun, IntArray], DoubleArray]] = {
    "first": lambda run, rows: np.zeros(len(rows)),
    "random": _random,
    "similarity": _similarity,
    "resolution": _resolution,
}
"""Rules of ``--select`` that score each image, float64 [n], given rows in ascending order: the highest is kept, of equal
ones the first."""
