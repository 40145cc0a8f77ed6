"""What all parts of one `balance` share once its rows are known, and searches whose time is counted."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import identity_of
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps.balance.filters.against import NearReferences, find_near
from clipcid_cli.steps.balance.filters.captions import CaptionWindow, find_captions
from clipcid_cli.steps.balance.rows import BalanceRows, count_skipped, find_rows
from clipcid_cli.steps.balance.search import find_forest
from clipcid_cli.steps.balance.stored_forest import Forest, ForestStore
from clipcid_cli.steps.chunks import SearchRun
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.plan import Plan


@dataclasses.dataclass(frozen=True)
class BalanceRun(SearchRun):
    """One run.

    Attributes:
        rows: The rows of the keep list.
        skips: Rows that are not finite.
        near: What lies near references; None without any.
        captions: What the window of caption similarity holds; None without one.
        began: When its output was begun, by `time.perf_counter`.
        seconds: Time by phase, but for that of writing.
    """

    settings: BalanceSettings
    embeddings: Embeddings
    output: Output[BalanceSidecar]
    rows: BalanceRows
    skips: Skips
    near: NearReferences | None
    captions: CaptionWindow | None
    began: float
    seconds: dict[str, float]

    def find_forest(self, *, cutoff: float | None = None, num_edges: int = 0) -> tuple[Forest, bool]:
        """Call :func:`find_forest` for these rows."""
        settings, for_stars = self.settings, self.settings.linkage == "star"
        inputs = [*self.output.run.inputs, *self.rows.describe_choice()]
        store = ForestStore(self.output.folder, self.work, self.rows, inputs, settings.neighbors, settings.overwrite)
        with timed(self.seconds, "search"):
            return find_forest(self, store, cutoff=cutoff, num_edges=num_edges, for_stars=for_stars)

    def phases(self) -> dict[str, float]:
        """Return the time by phase until now: what is neither searched nor audited is written."""
        other = self.seconds["search"] + self.seconds.get("audit", 0.0)
        phases = self.seconds | {"write": time.perf_counter() - self.began - other}
        return {phase: round(value, 3) for phase, value in phases.items()}


def begin(plan: Plan, machine: Machine, output: Output[BalanceSidecar], reporter: Reporter) -> BalanceRun:
    """Read all rows once, and drop what filters drop: each is a mask over the rows of the keep list."""
    began = time.perf_counter()
    settings, embeddings = plan.settings, plan.embeddings
    with timed(plan.seconds, "search"):
        rows = find_rows(machine, output.work, embeddings.rows(Kind.IMAGES), reporter)
    skips = count_skipped(embeddings, rows, settings.max_bad_fraction, reporter)
    scan = choose_scan(settings.precision, machine.device)
    search = SearchRun(machine, output.work, identity_of({}, output.run.inputs), embeddings.width, scan, reporter)
    near = captions = None
    is_left = np.ones(len(rows), np.bool_)
    if plan.references:
        assert settings.reference_distance is not None  # the settings have checked it
        near = find_near(search, output.folder, rows, plan.references, settings.reference_distance)
        is_left &= ~near.is_dropped
    if settings.has_window:
        captions = find_captions(search, settings, embeddings, rows)
        is_left &= ~captions.is_dropped
    if not is_left.any():
        raise ClipcidError(
            f"All {len(rows):,} images are dropped before repeats are searched.",
            "Give a smaller --against-threshold, or a wider window of caption similarity.",
        )
    if settings.has_filters:
        rows = rows.restrict(machine, output.work, is_left)
    if plan.clusters is not None:
        plan.clusters.warn_of_few(settings, rows.num_searched, reporter)
    return BalanceRun(
        **vars(search),
        settings=settings,
        embeddings=embeddings,
        output=output,
        rows=rows,
        skips=skips,
        near=near,
        captions=captions,
        began=began,
        seconds=plan.seconds,
    )
