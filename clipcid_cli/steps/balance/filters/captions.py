"""``--min-caption-similarity`` and ``--max-caption-similarity``: images by how similar they are to their captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from clipcid_cli.algorithms.near.exact import FloatArray, IntArray, cosine_similarities
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.report import PALETTE, make_figure, svg
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.rows import BalanceRows, has_caption
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.shared_arrays import collect_arrays, share_arrays

_ROWS_AT_ONCE = 4096
_BARS = 80


@dataclasses.dataclass(frozen=True)
class CaptionWindow:
    """The similarity of images to their captions, and the window that it must be in.

    Attributes:
        low: Lower end, inclusive; None for none.
        high: Upper end, inclusive; None for none.
        similarity: Cosine of each image and its caption, float32 [N]; NaN where there is no usable caption.
    """

    low: float | None
    high: float | None
    similarity: FloatArray

    @property
    def is_below(self) -> npt.NDArray[np.bool_]:
        """Which images lie below the window, bool [N]."""
        return np.asarray(self.similarity < np.float32(-np.inf if self.low is None else self.low))

    @property
    def is_above(self) -> npt.NDArray[np.bool_]:
        """Which images lie above the window, bool [N]."""
        return np.asarray(self.similarity > np.float32(np.inf if self.high is None else self.high))

    @property
    def is_inside(self) -> npt.NDArray[np.bool_]:
        """Which images lie inside, ends included, bool [N]."""
        return ~(np.isnan(self.similarity) | self.is_below | self.is_above)

    def summarise(self) -> dict[str, Any]:
        """Return what the JSON object says: the ends of the window, and how many images lie where."""
        return {
            "min": self.low,
            "max": self.high,
            "inside": int(np.count_nonzero(self.is_inside)),
            "below": int(np.count_nonzero(self.is_below)),
            "above": int(np.count_nonzero(self.is_above)),
            "without": int(np.count_nonzero(np.isnan(self.similarity))),
        }

    def refuse_empty(self) -> None:
        """Refuse a window that no image is in."""
        if self.is_inside.any():
            return
        usable = self.similarity[~np.isnan(self.similarity)]
        span = (
            f"they range from {usable.min():.4f} to {usable.max():.4f}" if len(usable) else "none has a usable caption"
        )
        raise ClipcidError(
            f"The caption similarity of none of the {len(self.similarity):,} images is in the window {self.describe()}: "
            f"{span}.",
            "Give another --min-caption-similarity or --max-caption-similarity.",
        )

    def describe(self) -> str:
        """Name the window: ``from 0.2 to 0.4``."""
        ends = [("from", self.low), ("to", self.high)]
        return " ".join(f"{word} {end:g}" for word, end in ends if end is not None)


def measure_captions(
    settings: BalanceSettings,
    machine: Machine,
    folder: Path,
    embeddings: Embeddings,
    rows: BalanceRows,
    reporter: Reporter,
) -> CaptionWindow:
    """Compare every image with its caption, each process a share of them; the same on every process.

    Args:
        folder: Where processes share what they find.
        rows: All finite rows.
    """
    texts = embeddings.rows(Kind.TEXTS)
    start, stop = machine.share(len(rows))
    similarity, captioned = np.empty(stop - start, np.float32), np.empty(stop - start, np.bool_)
    with reporter.progress("captions", stop - start, "images") as progress:
        for file in embeddings.files:
            ends = np.array([file.first, file.first + file.rows], rows.numbers.dtype)
            begin, end = np.searchsorted(rows.numbers, ends).clip(start, stop).tolist()
            if begin == end:
                continue
            part = slice(begin - start, end - start)
            captioned[part] = has_caption(embeddings, file)[rows.numbers[begin:end] - file.first]
            for at in range(begin, end, _ROWS_AT_ONCE):
                numbers = rows.numbers[at : min(at + _ROWS_AT_ONCE, end)]
                found = cosine_similarities(rows.images.take(numbers), texts.take(numbers))
                similarity[at - start : at - start + len(found)] = found
                progress.advance(len(found))
    parts = collect_arrays(machine, folder, (similarity, captioned))

    def merge() -> tuple[FloatArray]:
        whole, is_captioned = map(np.concatenate, zip(*parts, strict=True))
        return (_without_captions(whole, is_captioned),)

    (shared,) = share_arrays(machine, folder, merge)
    window = CaptionWindow(settings.min_caption_similarity, settings.max_caption_similarity, shared)
    window.refuse_empty()
    return window


def sample_captions(
    settings: BalanceSettings, embeddings: Embeddings, numbers: IntArray, captioned: npt.NDArray[np.bool_]
) -> CaptionWindow:
    """Compare some images with their captions, in this process.

    Args:
        numbers: Numbers of rows of the embeddings, int64 [n], ascending; those that are not finite are left out.
        captioned: Which have a caption, bool [n].
    """
    images, texts = embeddings.rows(Kind.IMAGES), embeddings.rows(Kind.TEXTS)
    found, is_finite = np.empty(len(numbers), np.float32), np.empty(len(numbers), np.bool_)
    for at in range(0, len(numbers), _ROWS_AT_ONCE):
        part = slice(at, at + _ROWS_AT_ONCE)
        rows = images.take(numbers[part])
        found[part], is_finite[part] = (
            cosine_similarities(rows, texts.take(numbers[part])),
            np.isfinite(rows).all(axis=1),
        )
    similarity = _without_captions(found, captioned)[is_finite]
    return CaptionWindow(settings.min_caption_similarity, settings.max_caption_similarity, similarity)


def _without_captions(similarity: FloatArray, captioned: npt.NDArray[np.bool_]) -> FloatArray:
    """Take the similarities of images without a caption away; folders of other tools may lack those of all."""
    if captioned.any():
        similarity[~captioned] = np.nan
    return similarity


def draw_window(window: CaptionWindow) -> Markup:
    """Draw the histogram of the similarities, the part inside the window in colour."""
    usable = window.similarity[~np.isnan(window.similarity)].astype(np.float64)
    low, high = float(usable.min()), float(usable.max())
    counts, edges = np.histogram(usable, bins=_BARS, range=(low, high) if low < high else (low - 0.01, low + 0.01))
    middles = (edges[:-1] + edges[1:]) / 2.0
    inside = (middles >= (-2.0 if window.low is None else window.low)) & (
        middles <= (2.0 if window.high is None else window.high)
    )
    figure = make_figure()
    axes = figure.add_subplot()
    colors = [PALETTE[0] if each else PALETTE[4] for each in inside.tolist()]
    axes.bar(middles, counts, width=np.diff(edges), color=colors)
    for end in (window.low, window.high):
        if end is not None:
            axes.axvline(end, color=PALETTE[1], linewidth=0.8, linestyle=":")
    axes.set(xlabel="cosine of image and caption", ylabel="images")
    return svg(figure, "Histogram of the similarity of images to their captions")
