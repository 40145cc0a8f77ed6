"""What all parts of one `balance` share: its plan, its rows, and searches whose time is counted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.filters.against import NearReferences
from clipcid_cli.steps.balance.filters.captions import CaptionWindow
from clipcid_cli.steps.balance.forests.stored import Forest, ForestStore
from clipcid_cli.steps.balance.pairs import NotComputed, collect_few_pairs, collect_pairs
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.search import find_forest
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.plan import Plan


@dataclasses.dataclass(frozen=True)
class BalanceRun:
    """One run of `balance` once its rows are known.

    Attributes:
        rows: The rows of the keep list.
        skips: Rows that are not finite.
        near: What lies near references; None without any.
        captions: What the window of caption similarity holds; None without one.
        began: When the output was begun, by `time.perf_counter`.
        seconds: Time by phase, but for that of writing.
    """

    plan: Plan
    machine: Machine
    output: Output[BalanceSidecar]
    reporter: Reporter
    rows: BalanceRows
    skips: Skips
    near: NearReferences | None
    captions: CaptionWindow | None
    began: float
    seconds: dict[str, float]

    @property
    def settings(self) -> BalanceSettings:
        """The settings."""
        return self.plan.settings

    @property
    def embeddings(self) -> Embeddings:
        """The embeddings."""
        return self.plan.embeddings

    def find_forest(self, *, cutoff: float | None = None, num_edges: int = 0) -> tuple[Forest, bool]:
        """Call :func:`find_forest` for these rows."""
        settings, output = self.settings, self.output
        inputs = [*output.run.inputs, *self.rows.describe_choice()]
        store = ForestStore(output.folder, output.work, self.rows, inputs, settings.neighbors, settings.overwrite)
        with self.timing("search"):
            return find_forest(
                self.machine,
                store,
                cutoff=cutoff,
                num_edges=num_edges,
                precision=settings.precision,
                reporter=self.reporter,
                for_stars=settings.linkage == "star",
            )

    def collect_pairs(self, labels: IntArray, cutoff: float) -> Edges:
        """Call :func:`collect_pairs` for these rows."""
        given = (self.machine, self.output.work, self.rows, labels, cutoff, self.settings.precision, self.reporter)
        with self.timing("search"):
            return collect_pairs(*given)

    def collect_few_pairs(self, labels: IntArray, cutoff: float) -> Edges | NotComputed:
        """Call :func:`collect_few_pairs` for these rows."""
        given = (self.machine, self.output.work, self.rows, labels, cutoff, self.settings.precision, self.reporter)
        return collect_few_pairs(*given)

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Add the time of what is done meanwhile to that of a phase."""
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def phases(self) -> dict[str, float]:
        """Return the time by phase until now: what is neither searched nor audited is written."""
        other = self.seconds["search"] + self.seconds.get("audit", 0.0)
        phases = self.seconds | {"write": time.perf_counter() - self.began - other}
        return {phase: round(value, 3) for phase, value in phases.items()}
