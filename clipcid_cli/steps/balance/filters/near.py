"""``--near``: of the images that other filters have left, those far from all targets are dropped.

Of ``--near-keep`` the distance follows from the images: a sample tells how far to compare, farther where that was too near.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clipcid_cli.algorithms.near.cutoff import Neighbours, draw_sample, find_neighbours, first_cutoff, wider_cutoff
from clipcid_cli.algorithms.near.exact import BoolArray, FloatArray, IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.keep_list import Column
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.filter import Dropped, Filter, FilterCost
from clipcid_cli.steps.balance.filters.reference import Reference
from clipcid_cli.steps.balance.filters.references import (
    Comparison,
    Nearest,
    compare,
    count_references,
    name_contents,
    number_rows,
)
from clipcid_cli.steps.balance.pictures import ReportPictures
from clipcid_cli.steps.balance.plan import BalanceInputs
from clipcid_cli.steps.balance.result import NearResult

_SAMPLE_ROWS = 512
# Share of the rows that is compared no farther than it must: of 20,000 rows with 5,000, at a distance within which all pairs
# are, 2 s were needed in place of 52.
_MOST = 0.95


@dataclasses.dataclass(frozen=True)
class FarImages(Dropped):
    """Which rows are near no target; those that other filters drop are not compared, and among them."""

    name: ClassVar = "near"
    reason: ClassVar = "far"
    words: ClassVar = "far from all target images"
    nearest: Nearest
    before: int  # rows that other filters have left

    @property
    def searches(self) -> frozenset[str]:
        return self.nearest.searches

    @property
    def num_kept(self) -> int:
        return int(np.count_nonzero(self.nearest.is_near))

    def summarise(self) -> NearResult:
        kept = self.num_kept
        return NearResult(self.nearest.threshold, kept, self.before - kept, self.nearest.count())

    def columns(self, folder: Path) -> list[Column]:
        return self.nearest.columns("near", folder)

    def show(self, run: BalanceRun, pictures: ReportPictures) -> list[dict[str, Any]]:
        return self.nearest.show(run, pictures)


@dataclasses.dataclass(frozen=True)
class Near(Filter):
    """Drops the images far from all targets, by a distance or down to a share."""

    def identify(self, references: Sequence[Reference]) -> dict[str, Any]:
        return {
            "near": name_contents(references, "--near"),
            "near_distance": self.settings.near_distance,
            "near_keep": self.settings.near_keep,
        }

    def estimate(self, inputs: BalanceInputs, sample: IntArray, searched: int) -> FilterCost:
        share = self.settings.near_keep
        # What is within a distance is not known.
        left = searched if share is None else max(1, round(share * searched))
        return FilterCost({"near": count_references(inputs, "--near", searched)}, left)

    def apply(self, run: BalanceRun, is_left: BoolArray) -> FarImages:
        if self.settings.near_keep is not None:
            nearest = _find_share(run, self.settings.near_keep)
        else:
            assert self.settings.near_distance is not None  # the settings have checked it
            nearest = _find_within(run, self.settings.near_distance)
        far = FarImages(~nearest.is_near, nearest, run.rows.num_searched)
        within = f"{far.num_kept:,} of {far.before:,} images are within {nearest.threshold:g} of a target"
        if far.num_kept == far.before and self.settings.near_keep != 1.0:
            reporting.warn(f"--near drops nothing: {within}{nearest.name_equal()}")
        else:
            reporting.note(f"{within}.")
        return far


def _find_within(run: BalanceRun, threshold: float) -> Nearest:
    sampled_RS = _sample_distances(run)
    nearest = _compare(run, threshold, sampled_RS).up_to(threshold)
    if not nearest.is_near.any():
        size = sampled_RS.shape[1]
        images = "the images" if size == len(run.rows.unique) else f"{size:,} sampled ones"
        raise ClipcidError(
            f"None of the {run.rows.num_searched:,} images is within {threshold:g} of a target: "
            f"the nearest of {images} is {sampled_RS.min():.4f} away.",
            "Give a larger --near-distance, or the share to keep: --near-keep R.",
        )
    return nearest


def _find_share(run: BalanceRun, share: float) -> Nearest:
    """Find the share of the rows that is nearest to the targets, with all that are as near as the last of them."""
    needed = max(1, round(share * run.rows.num_searched))
    sampled_RS = _sample_distances(run)
    nearest_S = np.sort(sampled_RS.min(axis=0))
    searched_to = first_cutoff(nearest_S, np.ones(len(nearest_S)), share)
    comparison = _compare(run, searched_to, sampled_RS)
    while (count := run.context.on_rank0(partial(_count_near, comparison))) < needed:
        reporting.note(
            f"{count:,} of the {needed:,} images to keep are within {searched_to:.4f}: farther ones are compared."
        )
        searched_to = wider_cutoff(nearest_S, searched_to, count, needed)
        comparison = _compare(run, searched_to, sampled_RS)
    return comparison.up_to(run.context.on_rank0(_distance_of, comparison, needed))


def _sample_distances(run: BalanceRun) -> FloatArray:
    """Return the distance of sampled rows to the nearest row of each target, float32 [R, S]; the same everywhere."""
    unique, context = run.rows.unique, run.context
    sample = unique[draw_sample(len(unique), _SAMPLE_ROWS, seed=0)]
    sampled = np.arange(len(sample))
    distances = list[FloatArray]()
    for target in run.references_of("--near"):
        others, read = number_rows(run, target)
        rows = np.concatenate([sample.astype(others.dtype), others])
        start, stop = context.rank_range(len(others))
        share = (len(sample) + start, len(sample) + stop)
        find = partial(find_neighbours, read, rows, sampled, 1, context.device, share)
        distances.append(Neighbours.nearest(context.gather(context.on_all(find)), 1).distance)
    return np.stack(distances)


def _compare(run: BalanceRun, searched_to: float, sampled_RS: FloatArray) -> Comparison:
    """Compare with all targets up to a distance; one beyond most rows takes little longer than a near one."""
    distances = [[*_steps_before(searched_to, sampled_S), searched_to] for sampled_S in sampled_RS]
    return compare(run, run.references_of("--near"), distances, "near")


def _steps_before(searched_to: float, sampled_S: FloatArray) -> list[float]:
    """Return smaller distances, within which most rows have their nearest one: only the others are compared farther.

    Within a distance beyond most of the nearest rows there are most other rows, too, and each of them would be a candidate.
    """
    most = np.quantile(sampled_S, (_MOST, 1.0)).astype(np.float32)
    return [float(step) for step in np.unique(most[most < np.float32(searched_to)])]


def _count_near(comparison: Comparison) -> int:
    return int(np.count_nonzero(np.isfinite(_distances_to_nearest(comparison))))


def _distance_of(comparison: Comparison, count: int) -> float:
    """Return the distance within which so many rows are, or more where several are as near as the last."""
    return float(np.partition(_distances_to_nearest(comparison), count - 1)[count - 1])


def _distances_to_nearest(comparison: Comparison) -> FloatArray:
    """Return the distance of each row to the nearest target, float32 [N]; infinite where none is near."""
    rows = comparison.run.rows
    distance = np.full(len(rows), np.inf, np.float32)
    for pairs in comparison.pairs:
        distance[pairs.a] = np.minimum(distance[pairs.a], pairs.weight)
    distance[rows.copies.b] = distance[rows.copies.a]
    return distance
