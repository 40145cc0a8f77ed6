"""``--min-caption-similarity`` and ``--max-caption-similarity``: images by how similar they are to their captions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.compute as pc
from markupsafe import Markup

from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray, cosine_similarities
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.report import PALETTE, make_figure, svg
from clipcid_cli.formats.results.keep_list import Column, float_column
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.cost_result import CaptionCost
from clipcid_cli.steps.balance.filters.filter import SAMPLED, Dropped, Filter, FilterCost
from clipcid_cli.steps.balance.pictures import ReportPictures
from clipcid_cli.steps.balance.plan import BalanceInputs
from clipcid_cli.steps.balance.result import CaptionWindowResult
from clipcid_cli.steps.reporting import Progress
from clipcid_cli.steps.settings.balance import BalanceSettings

_ROWS_AT_ONCE = 4096
_BARS = 80


@dataclasses.dataclass(frozen=True)
class CaptionWindow(Dropped):
    """The window, from −∞ or to ∞ where it has no such end, of caption similarity; images outside are dropped."""

    name: ClassVar = "caption_window"
    reason: ClassVar = "caption"
    words: ClassVar = "outside the window of caption similarity"
    low: float
    high: float
    # Cosine of each image and its caption, float32 [N]; NaN, and so outside, where there is no usable caption.
    similarity: FloatArray

    @classmethod
    def from_settings(cls, settings: BalanceSettings, similarity: FloatArray) -> CaptionWindow:
        low = -math.inf if settings.min_caption_similarity is None else settings.min_caption_similarity
        high = math.inf if settings.max_caption_similarity is None else settings.max_caption_similarity
        is_inside = (similarity >= np.float32(low)) & (similarity <= np.float32(high))
        return cls(~is_inside, low, high, similarity)

    def summarise(self) -> CaptionWindowResult:
        """Return what the JSON object says: the ends of the window, and how many images lie where."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return CaptionWindowResult(
            min=low,
            max=high,
            inside=int(np.count_nonzero(~self.is_dropped)),
            below=int(np.count_nonzero(self.similarity < np.float32(self.low))),
            above=int(np.count_nonzero(self.similarity > np.float32(self.high))),
            without=int(np.count_nonzero(np.isnan(self.similarity))),
        )

    def columns(self, folder: Path) -> list[Column]:
        return [float_column("caption_similarity", self.similarity)]

    def validate_not_empty(self) -> None:
        if not self.is_dropped.all():
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
        return " ".join(f"{word} {end:g}" for word, end in ends if math.isfinite(end))

    def show(self, run: BalanceRun, pictures: ReportPictures) -> Markup:
        """Draw how similar images are to their captions."""
        usable = self.similarity[~np.isnan(self.similarity)].astype(np.float64)
        low, high = float(usable.min()), float(usable.max())
        counts, edges = np.histogram(usable, bins=_BARS, range=(low, high) if low < high else (low - 0.01, low + 0.01))
        middles = (edges[:-1] + edges[1:]) / 2.0
        is_inside = (middles >= self.low) & (middles <= self.high)
        figure = make_figure()
        axes = figure.add_subplot()
        axes.bar(middles, counts, width=np.diff(edges), color=np.where(is_inside, PALETTE[0], PALETTE[4]))
        for end in filter(math.isfinite, (self.low, self.high)):
            axes.axvline(end, color=PALETTE[1], linewidth=0.8, linestyle=":")
        axes.set(xlabel="cosine of image and caption", ylabel="images")
        return svg(figure, "Histogram of the similarity of images to their captions")


@dataclasses.dataclass(frozen=True)
class Captions(Filter):
    """Drops images by how similar they are to their captions."""

    def estimate(self, inputs: BalanceInputs, sample: IntArray, searched: int) -> FilterCost:
        embeddings = inputs.embeddings
        window = CaptionWindow.from_settings(self.settings, compare_captions(embeddings, sample, Progress()))
        if embeddings.num_rows <= SAMPLED:
            window.validate_not_empty()
        cost = CaptionCost(len(sample), int(np.count_nonzero(~window.is_dropped)) / len(sample))
        # Texts are read, and a similarity of each image is written as a float32.
        fields = {"caption_window": cost}
        return FilterCost(fields, round(cost.share * searched), mapped_rows=embeddings.num_rows, bytes_an_image=4)

    def apply(self, run: BalanceRun, is_left: BoolArray) -> CaptionWindow:
        rows = run.rows
        start, stop = run.context.rank_range(len(rows))
        mine = rows.numbers[start:stop]

        def compare() -> Arrays:
            with reporting.progress("captions", len(mine), "images") as progress:
                return (compare_captions(run.embeddings, mine, progress),)

        parts = run.shared.collect(compare)

        def merge() -> tuple[FloatArray]:
            similarity = np.concatenate([part for (part,) in parts])
            CaptionWindow.from_settings(self.settings, similarity).validate_not_empty()
            return (similarity,)

        window = CaptionWindow.from_settings(self.settings, *run.shared.publish(merge))
        num_inside = np.count_nonzero(~window.is_dropped)
        reporting.note(f"{num_inside:,} of {len(rows):,} images have a caption similarity {window.describe()}.")
        return window


def compare_captions(embeddings: Embeddings, numbers: IntArray, progress: Progress) -> FloatArray:
    """Return the cosine of some images, by ascending numbers, and their captions, float32 [n].

    It is NaN where there is no caption, or an embedding is zero or not finite.
    """
    images, texts = embeddings.rows(Kind.IMAGES), embeddings.rows(Kind.TEXTS)
    similarity = np.empty(len(numbers), np.float32)
    for at in range(0, len(numbers), _ROWS_AT_ONCE):
        some = numbers[at : at + _ROWS_AT_ONCE]
        similarity[at : at + len(some)] = cosine_similarities(images.take(some), texts.take(some))
        progress.advance(len(some))
    similarity[~have_captions(embeddings, numbers)] = np.nan
    return similarity


def have_captions(embeddings: Embeddings, numbers: IntArray) -> BoolArray:
    """Tell which rows of the embeddings, by ascending numbers, have a caption, bool [n].

    Folders of other tools may have text embeddings without captions: all their images then count as captioned.
    """
    captions = embeddings.take_column(embeddings.captions_of, numbers)
    captioned = [pc.not_equal(piece, "").to_numpy(zero_copy_only=False) for piece in captions]
    if any(piece.any() for piece in captioned):
        return np.concatenate(captioned)
    all_captions = map(embeddings.captions_of, embeddings.files)
    has_none = not any(pc.any(pc.not_equal(column, "")).as_py() for column in all_captions)
    return np.full(len(numbers), has_none)
