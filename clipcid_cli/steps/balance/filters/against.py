"""``--against``: images near a reference are dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from clipcid_cli.algorithms.near.exact import BoolArray, IntArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.keep_list import Column
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.filters.filter import Dropped, Filter, FilterCost
from clipcid_cli.steps.balance.filters.reference import Reference
from clipcid_cli.steps.balance.filters.references import Nearest, compare, count_references, name_contents
from clipcid_cli.steps.balance.pictures import ReportPictures
from clipcid_cli.steps.balance.plan import BalanceInputs
from clipcid_cli.steps.balance.result import AgainstResult


@dataclasses.dataclass(frozen=True)
class NearReferences(Dropped):
    """Which rows lie near a reference, and are dropped."""

    name: ClassVar = "against"
    reason: ClassVar = "reference"
    words: ClassVar = "near a reference image"
    nearest: Nearest

    @property
    def searches(self) -> frozenset[str]:
        return self.nearest.searches

    def summarise(self) -> AgainstResult:
        dropped = int(np.count_nonzero(self.is_dropped))
        return AgainstResult(self.nearest.threshold, dropped, self.nearest.count())

    def columns(self, folder: Path) -> list[Column]:
        return self.nearest.columns("reference", folder)

    def show(self, run: BalanceRun, pictures: ReportPictures) -> list[dict[str, Any]]:
        return self.nearest.show(run, pictures)


@dataclasses.dataclass(frozen=True)
class Against(Filter):
    """Drops the images within a distance of a reference."""

    def identify(self, references: Sequence[Reference]) -> dict[str, Any]:
        contents = name_contents(references, "--against")
        return {"against": contents, "against_threshold": self.settings.reference_distance}

    def estimate(self, inputs: BalanceInputs, sample: IntArray, searched: int) -> FilterCost:
        # What references drop within a distance is not known.
        return FilterCost({"against": count_references(inputs, "--against", searched)}, searched)

    def apply(self, run: BalanceRun, is_left: BoolArray) -> NearReferences:
        threshold = self.settings.reference_distance
        assert threshold is not None  # the settings have checked it
        references = run.references_of("--against")
        distances = [[threshold] for _ in references]
        nearest = compare(run, references, distances, "against").up_to(threshold)
        near = np.count_nonzero(nearest.is_near)
        if near == len(run.rows):
            raise ClipcidError(
                f"All {near:,} images are within {threshold:g} of a reference, and would be dropped{nearest.name_equal()}",
                "Give other references with --against, or a smaller --against-threshold.",
            )
        reporting.note(f"{near:,} of {len(run.rows):,} images are within {threshold:g} of a reference.")
        return NearReferences(nearest.is_near, nearest)
