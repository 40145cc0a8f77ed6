"""What the filters of a `balance` would read and take, for `--dry-run`: estimated from some rows, nothing is written."""

from __future__ import annotations

import dataclasses

import numpy as np

from clipcid_cli.algorithms.near.block import load_block
from clipcid_cli.algorithms.near.exact import HalfArray, IntArray
from clipcid_cli.algorithms.near.search import near_pairs
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.balance.filters.captions import sample_captions
from clipcid_cli.steps.balance.filters.cluster_cap import FoundClusters
from clipcid_cli.steps.balance.filters.references import PlannedReference
from clipcid_cli.steps.balance.rows import has_caption
from clipcid_cli.steps.reporting import Reporter, format_duration
from clipcid_cli.steps.settings.balance import BalanceSettings

_PANEL_ROWS = 8192
# Rows of a file whose captions are compared, in one piece: far fewer than a file has, and enough for a fast read.
_STRETCH = 512
_SHORTEST = 0.1
# While and after they are compared: the nearest reference row of each image and its distance, saved for each reference; the
# names of reference and key, and the distance, in the keep list.
_PART_BYTES = 12
_BYTES_OF_REFERENCE = 12
_BYTES_OF_NUMBER = 4


@dataclasses.dataclass(frozen=True)
class ReferenceCost:
    """What one reference takes.

    Attributes:
        rows: Its images.
        to_embed: Whether they are yet to be embedded.
        embed_seconds: What that takes.
        pairs: Pairs of an image and one of its images.
        seconds: Time to compare them on these processes.
    """

    name: str
    rows: int
    to_embed: bool
    embed_seconds: float
    pairs: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class CaptionCost:
    """What the caption window takes.

    Attributes:
        sampled: Images whose similarity was measured: some of some files.
        inside: The share of them inside the window.
        seconds: Time to measure all on these processes.
    """

    sampled: int
    inside: float
    seconds: float

    @property
    def share(self) -> float:
        """Share of all images inside the window; where none of those measured is, the most it is with 95 % confidence."""
        return self.inside or min(1.0, 3.0 / max(1, self.sampled))


@dataclasses.dataclass(frozen=True)
class FilterCost:
    """What is done before and after the search.

    Attributes:
        against: One entry a reference; None without references.
        captions: None without a window.
        clusters: Number of images in the clusters of ``--max-per-cluster``; None without it.
        mapped: Bytes of rows that are mapped beside those of the images.
        disk: Bytes that are written beside keep list and forest.
    """

    against: list[ReferenceCost] | None
    captions: CaptionCost | None
    clusters: int | None
    mapped: int
    disk: int

    @property
    def share_searched(self) -> float:
        """Share of the images that is searched, as far as it is known: those near a reference are not taken off."""
        return 1.0 if self.captions is None else self.captions.share

    @property
    def is_bound(self) -> bool:
        """Whether that share is only the most it may be."""
        return self.captions is not None and not self.captions.inside


def estimate_filters(
    settings: BalanceSettings,
    machine: Machine,
    embeddings: Embeddings,
    finite: IntArray,
    references: list[PlannedReference],
    clusters: FoundClusters | None,
) -> FilterCost:
    """Estimate what the filters take, on the first process.

    Args:
        finite: Some finite rows, in random order.
        clusters: Those of ``--max-per-cluster``.
    """
    images, width = embeddings.num_rows, embeddings.width
    mapped = sum(2 * each.num_rows * width for each in references)
    made = sum(each.embedding["bytes"] for each in references if each.embedding is not None)
    disk = made + images * (_PART_BYTES * len(references) + (_BYTES_OF_REFERENCE if references else 0))
    against = [_estimate_reference(settings, machine, embeddings, finite, each) for each in references] or None
    captions = None
    if settings.has_window:
        captions = _estimate_captions(settings, machine, embeddings)
        mapped += 2 * images * width
        disk += _BYTES_OF_NUMBER * images
    if clusters is not None:
        disk += _BYTES_OF_NUMBER * images
    return FilterCost(against, captions, None if clusters is None else clusters.images, mapped, disk)


def _estimate_reference(
    settings: BalanceSettings,
    machine: Machine,
    embeddings: Embeddings,
    finite: IntArray,
    reference: PlannedReference,
) -> ReferenceCost:
    limit, num_rows = settings.reference_distance, embeddings.num_rows
    assert limit is not None  # the settings have checked it
    images = embeddings.rows(Kind.IMAGES)
    # Rows of the images stand for those that are yet to be embedded.
    others = images if reference.embeddings is None else reference.embeddings.rows(Kind.IMAGES)
    few = finite[:_PANEL_ROWS]
    numbers = np.linspace(0, len(others) - 1, min(reference.num_rows, _PANEL_ROWS)).astype(np.int64)

    def read(rows: IntArray) -> HalfArray:
        found = images.take(rows) if rows[0] < num_rows else others.take(rows - num_rows)
        return np.where(np.isfinite(found).all(axis=1, keepdims=True), found, np.float16(0.0))

    scan = choose_scan(settings.precision, machine.device).dtype
    panel = load_block(read, num_rows + numbers, machine.device, scan)

    def compare() -> None:
        block = load_block(read, few, machine.device, scan)
        for _ in near_pairs(block, panel, limit, lambda a, b, _: np.ones(len(a), np.bool_)):
            pass

    taken = time_trial(compare, machine.device, at_least=_SHORTEST).seconds
    pairs = num_rows * reference.num_rows
    cost = reference.embedding
    return ReferenceCost(
        reference.name,
        reference.num_rows,
        cost is not None,
        0.0 if cost is None else float(cost["seconds"]["encode"]),
        pairs,
        taken * pairs / (len(few) * len(numbers)) / machine.size,
    )


def _estimate_captions(settings: BalanceSettings, machine: Machine, embeddings: Embeddings) -> CaptionCost:
    """Measure the rows of one panel, of as many files as have so many; where they have more, stretches of each."""
    files, num_rows = [file for file in embeddings.files if file.rows], embeddings.num_rows
    number = min(len(files), max(1, _PANEL_ROWS // max(1, num_rows // len(files))))
    chosen = [files[place] for place in np.linspace(0, len(files) - 1, number).astype(np.int64).tolist()]
    most = _PANEL_ROWS if num_rows <= _PANEL_ROWS else _PANEL_ROWS // number
    places = [_spread(file.rows, most) for file in chosen]
    numbers = np.concatenate([file.first + place for file, place in zip(chosen, places, strict=True)])
    # Captions are read file by file, whole.
    reading = time_trial(lambda: [has_caption(embeddings, file) for file in chosen], warm_up=0)
    captioned = np.concatenate([found[place] for found, place in zip(reading.result, places, strict=True)])
    comparing = time_trial(lambda: sample_captions(settings, embeddings, numbers, captioned), warm_up=0)
    window, sampled = comparing.result, len(comparing.result.similarity)
    if len(numbers) == num_rows:
        window.refuse_empty()
    inside = int(np.count_nonzero(window.is_inside)) / max(1, sampled)
    a_row = reading.seconds / sum(file.rows for file in chosen) + comparing.seconds / len(numbers)
    return CaptionCost(sampled, inside, a_row * num_rows / machine.size)


def _spread(num_rows: int, most: int) -> IntArray:
    """Return all of the rows, or at most so many in stretches spread over them, int64 [n], ascending."""
    if num_rows <= most:
        return np.arange(num_rows)
    length = min(most, _STRETCH)
    starts = np.linspace(0, num_rows - length, most // length).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(length))


def describe_filters(cost: FilterCost, clusters: FoundClusters | None, reporter: Reporter) -> None:
    """Say what the filters take.

    Args:
        clusters: Those of ``--max-per-cluster``.
    """
    if cost.against is not None or cost.captions is not None:
        reporter.note("Before it, images are dropped:")
    for each in cost.against or ():
        embed = f" to embed first, about {format_duration(each.embed_seconds)}" if each.to_embed else ""
        reporter.note(
            f"  against {each.name}: {each.rows:,} images{embed}; {each.pairs:,} pairs, about "
            f"{format_duration(each.seconds)}."
        )
    if cost.captions is not None:
        found = (
            f"none of {cost.captions.sampled:,} sampled images is inside the window, so at most "
            f"{100 * cost.captions.share:.2g}% of all images are (95 % confidence)."
            if cost.is_bound
            else f"{cost.captions.inside:.1%} of {cost.captions.sampled:,} sampled images are inside the window."
        )
        reporter.note(f"  captions: about {format_duration(cost.captions.seconds)}; {found}")
    if clusters is not None:
        reporter.note(f"After it, clusters are capped: {clusters.folder}, {clusters.images:,} images.")
