"""What all parts of one `balance` share: its settings and rows, and searches whose time is counted."""

from __future__ import annotations

import dataclasses
import time

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.balance.filters.select import Filters
from clipcid_cli.steps.balance.pairs import collect_pairs
from clipcid_cli.steps.balance.rows import BalanceRows
from clipcid_cli.steps.balance.search import find_forest
from clipcid_cli.steps.balance.stored_forest import Forest, ForestStore
from clipcid_cli.steps.chunks import SearchRun
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings


@dataclasses.dataclass(frozen=True)
class Context:
    """One run of `balance`.

    Attributes:
        output: Its output.
        data: The data itself where ``--select resolution`` reads it; else None.
        inputs: The files of the embeddings, and the rows to balance where those are not all.
        filters: What was dropped before, and what is left.
        search: What all searches share.
        seconds: Time by phase; searches add theirs to ``search``.
    """

    settings: BalanceSettings
    machine: Machine
    output: Output[BalanceSidecar]
    embeddings: Embeddings
    data: Dataset | None
    inputs: list[FileRecord]
    filters: Filters
    search: SearchRun
    reporter: Reporter
    seconds: dict[str, float]

    @property
    def rows(self) -> BalanceRows:
        """The rows to balance."""
        return self.filters.rows

    def find_forest(self, *, cutoff: float | None = None, num_edges: int = 0) -> tuple[Forest, bool]:
        """Call :func:`find_forest` for these rows."""
        started, settings, output = time.perf_counter(), self.settings, self.output
        store = ForestStore(output.folder, output.work, self.rows, self.inputs, settings.neighbors, settings.overwrite)
        for_stars = settings.linkage == "star"
        found = find_forest(self.search, store, cutoff=cutoff, num_edges=num_edges, for_stars=for_stars)
        self.seconds["search"] += time.perf_counter() - started
        return found

    def collect_pairs(self, labels: IntArray, cutoff: float) -> Edges:
        """Call :func:`collect_pairs` for these rows."""
        started = time.perf_counter()
        found = collect_pairs(self.search, self.rows, labels, cutoff)
        self.seconds["search"] += time.perf_counter() - started
        return found
