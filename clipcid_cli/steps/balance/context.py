"""What all parts of one `balance` share: its settings and rows, and searches whose time is counted."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from clipcid_cli.algorithms.search.distances import IntArray
from clipcid_cli.algorithms.search.edges import Edges
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.filters.select import Filters
from clipcid_cli.steps.balance.forests.grown import list_row_files
from clipcid_cli.steps.balance.forests.stored import Forest
from clipcid_cli.steps.balance.pairs import collect_pairs
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.search import find_forest
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings


@dataclasses.dataclass(frozen=True)
class Context:
    """One run of `balance`.

    Attributes:
        folder: Where the forest is stored.
        data: The data itself where ``--select resolution`` reads it; else None.
        fingerprints: Of the files of the embeddings, and of the rows to balance where those are not all.
        filters: What was dropped before, and what is left.
        seconds: Time by phase; searches add theirs to ``search``.
    """

    settings: BalanceSettings
    machine: Machine
    folder: Path
    embeddings: Embeddings
    data: Dataset | None
    fingerprints: list[dict[str, Any]]
    filters: Filters
    reporter: Reporter
    seconds: dict[str, float]

    @property
    def rows(self) -> BalanceRows:
        """The rows to balance."""
        return self.filters.rows

    def find_forest(self, *, cutoff: float | None = None, num_edges: int = 0) -> tuple[Forest, bool]:
        """Call :func:`find_forest` for these rows."""
        started = time.perf_counter()
        found = find_forest(
            self.machine,
            self.folder,
            self.rows,
            self.fingerprints,
            cutoff=cutoff,
            num_edges=num_edges,
            neighbors=self.settings.neighbors,
            precision=self.settings.precision,
            reporter=self.reporter,
            for_stars=self.settings.linkage == "star",
            files=() if self.rows.positions is not None else list_row_files(self.embeddings, self.fingerprints),
        )
        self.seconds["search"] += time.perf_counter() - started
        return found

    def collect_pairs(self, labels: IntArray, cutoff: float) -> Edges:
        """Call :func:`collect_pairs` for these rows."""
        started = time.perf_counter()
        given = (self.machine, self.folder, self.rows)
        found = collect_pairs(*given, labels, cutoff, self.settings.precision, self.reporter)
        self.seconds["search"] += time.perf_counter() - started
        return found
