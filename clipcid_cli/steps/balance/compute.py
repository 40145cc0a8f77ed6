"""From rows to what is kept, on all processes: filters, sets, filters of what they have left, the audit."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.libraries import keep_few_kernels
from clipcid_cli.runtime.precision import choose_coarse_dtype
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.compared_linkage import ComparedLinkage, compare_linkages
from clipcid_cli.steps.balance.pairs import NotComputed
from clipcid_cli.steps.balance.plan import BalancePlan
from clipcid_cli.steps.balance.result import Audit
from clipcid_cli.steps.balance.rows import BalanceRows, read_rows
from clipcid_cli.steps.balance.sets import Sets, divide, measure_sets
from clipcid_cli.steps.balance.shared_arrays import SharedArrays
from clipcid_cli.steps.embeddings import skip_rows

if TYPE_CHECKING:
    from clipcid_cli.steps.balance.filters.filter import Dropped


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is to be written: what each filter has found, sets, the forest they were made from, and which rows are kept."""

    run: BalanceRun  # with the rows that filters have left to be searched
    dropped_first: list[Dropped]  # by each filter before the search, in their order
    sets: Sets
    forest: Edges
    compared: ComparedLinkage | NotComputed
    dropped_last: list[Dropped]  # by each filter of what repeats have left
    is_kept: BoolArray  # in the end, bool [N]
    audit: Audit | None

    @property
    def filters(self) -> list[Dropped]:
        """What all filters have dropped, in their order."""
        return self.dropped_first + self.dropped_last

    @property
    def searches(self) -> frozenset[str]:
        """The names of the comparisons with references."""
        return frozenset[str]().union(*(dropped.searches for dropped in self.filters))


def begin(plan: BalancePlan, output: Output[BalanceSidecar], context: DistContext) -> BalanceRun:
    """Read all rows once."""
    began = time.perf_counter()
    shared = SharedArrays(context, output.work)
    with timed(plan.seconds, "search"):
        rows = read_rows(shared, plan.embeddings.rows(Kind.IMAGES))
    return BalanceRun(
        **vars(plan),
        context=context,
        output=output,
        shared=shared,
        rows=rows,
        skips=_count_skipped(plan, rows),
        scan=choose_coarse_dtype(plan.settings.precision, context.device),
        began=began,
    )


def _count_skipped(plan: BalancePlan, rows: BalanceRows) -> Skips:
    """Count and name the rows that are not finite."""
    embeddings = plan.embeddings
    if not len(rows):
        raise ClipcidError(
            f"None of the {embeddings.num_rows:,} rows of {embeddings.folder} is finite.", "Embed again."
        )
    is_bad = np.ones(embeddings.num_rows, np.bool_)
    is_bad[rows.numbers] = False
    return skip_rows(embeddings, np.flatnonzero(is_bad), plan.settings.max_bad_fraction)


def compute(plan: BalancePlan, output: Output[BalanceSidecar], context: DistContext) -> Outcome:
    """Find what is kept, on all processes."""
    if plan.settings.neighbors == "partitioned":  # the tiles of partitions are of many sizes
        keep_few_kernels()
    run = begin(plan, output, context)
    dropped_first: list[Dropped] = []
    dropped_last: list[Dropped] = []
    if run.filters:
        from clipcid_cli.steps.balance.filters.apply import filter_rows

        run, dropped_first = filter_rows(run)
    division, forest, reused = divide(run)
    sets = measure_sets(run, division)
    if reused:
        reporting.note("The forest of these embeddings exists: keep list, curve and report are made from it.")
    compared = compare_linkages(run, sets, forest)
    is_kept = sets.kept
    if run.filters:
        from clipcid_cli.steps.balance.filters.apply import filter_kept

        dropped_last, is_kept = filter_kept(run, is_kept)
    audit = _audit(run, sets, is_kept)
    context.barrier()  # until here another process may read what it has mapped
    return Outcome(run, dropped_first, sets, forest.edges, compared, dropped_last, is_kept, audit)


def _audit(run: BalanceRun, sets: Sets, is_kept: BoolArray) -> Audit | None:
    """Estimate what a search in partitions has missed."""
    if run.settings.neighbors != "partitioned" or sets.threshold is None:
        return None
    from clipcid_cli.steps.balance.partition import audit_kept

    with timed(run.seconds, "audit"):
        return audit_kept(run, np.flatnonzero(is_kept).astype(sets.labels.dtype), sets.threshold)
