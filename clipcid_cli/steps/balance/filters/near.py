"""``--near``: of the images that other filters have left, those far from all targets are dropped.

Of ``--near-keep`` the distance follows from the images: a sample tells how far to compare, farther where that was too near.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

from clipcid_cli.algorithms.near.cutoff import first_cutoff, wider_cutoff
from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.keep_list import Column
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.references import Comparison, Nearest, compare, sample_distances
from clipcid_cli.steps.balance.result import NearResult


@dataclasses.dataclass(frozen=True)
class FarImages:
    """Which rows lie near a target; all others are dropped."""

    reason: ClassVar = "far"
    nearest: Nearest
    before: int  # rows that other filters have left

    @property
    def is_dropped(self) -> BoolArray:
        """Which rows are near no target, bool [N]; those that other filters drop are not compared, and among them."""
        return ~self.nearest.is_near

    @property
    def num_kept(self) -> int:
        return int(np.count_nonzero(self.nearest.is_near))

    def summarise(self) -> NearResult:
        kept = self.num_kept
        return NearResult(self.nearest.threshold, kept, self.before - kept, self.nearest.count())

    def columns(self, folder: Path) -> list[Column]:
        return self.nearest.columns("near", folder)


def find_far(run: BalanceRun) -> FarImages:
    """Find the rows that are near a target; the same on every process."""
    settings = run.settings
    if settings.near_keep is not None:
        nearest = _find_share(run, settings.near_keep)
    else:
        assert settings.near_distance is not None  # the settings have checked it
        nearest = _find_within(run, settings.near_distance)
    far = FarImages(nearest, run.rows.num_searched)
    within = f"{far.num_kept:,} of {far.before:,} images are within {nearest.threshold:g} of a target"
    if far.num_kept == far.before and settings.near_keep != 1.0:
        reporting.warn(f"--near drops nothing: {within}{nearest.name_equal()}")
    else:
        reporting.note(f"{within}.")
    return far


def _find_within(run: BalanceRun, threshold: float) -> Nearest:
    targets = run.references_of("--near")
    sampled_RS = sample_distances(run, targets)
    nearest = compare(run, targets, threshold, "near", sampled_RS).up_to(threshold)
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
    targets = run.references_of("--near")
    needed = max(1, round(share * run.rows.num_searched))
    sampled_RS = sample_distances(run, targets)
    nearest_S = np.sort(sampled_RS.min(axis=0))
    searched_to = first_cutoff(nearest_S, np.ones(len(nearest_S)), share)
    comparison = compare(run, targets, searched_to, "near", sampled_RS)
    while (count := run.context.on_rank0(comparison.count_near)) < needed:
        reporting.note(
            f"{count:,} of the {needed:,} images to keep are within {searched_to:.4f}: farther ones are compared."
        )
        searched_to = wider_cutoff(nearest_S, searched_to, count, needed)
        comparison = compare(run, targets, searched_to, "near", sampled_RS)
    return comparison.up_to(run.context.on_rank0(lambda: _distance_of(comparison, needed)))


def _distance_of(comparison: Comparison, count: int) -> float:
    """Return the distance within which so many rows are, or more where several are as near as the last."""
    return float(np.partition(comparison.distances(), count - 1)[count - 1])
