"""``--against``: images near a reference are dropped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.keep_list import Column
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.references import Nearest, compare
from clipcid_cli.steps.balance.result import AgainstResult


@dataclasses.dataclass(frozen=True)
class NearReferences:
    """Which rows lie near a reference, and are dropped."""

    reason: ClassVar = "reference"
    nearest: Nearest

    @property
    def is_dropped(self) -> BoolArray:
        return self.nearest.is_near

    def summarise(self) -> AgainstResult:
        dropped = int(np.count_nonzero(self.is_dropped))
        return AgainstResult(self.nearest.threshold, dropped, self.nearest.count())

    def columns(self, folder: Path) -> list[Column]:
        return self.nearest.columns("reference", folder)


def find_near(run: BalanceRun) -> NearReferences:
    """Find the rows that are near a reference; the same on every process."""
    threshold = run.settings.reference_distance
    assert threshold is not None  # the settings have checked it
    nearest = compare(run, run.references_of("--against"), threshold, "against").up_to(threshold)
    near = np.count_nonzero(nearest.is_near)
    if near == len(run.rows):
        raise ClipcidError(
            f"All {near:,} images are within {threshold:g} of a reference, and would be dropped{nearest.name_equal()}",
            "Give other references with --against, or a smaller --against-threshold.",
        )
    reporting.note(f"{near:,} of {len(run.rows):,} images are within {threshold:g} of a reference.")
    return NearReferences(nearest)
