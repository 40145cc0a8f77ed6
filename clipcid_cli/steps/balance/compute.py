"""From rows to what is kept, on all processes: filters, sets, the limit on clusters, the audit."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.rows import Kind
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
from clipcid_cli.steps.balance.sets import Sets, make_sets
from clipcid_cli.steps.balance.shared_arrays import SharedArrays
from clipcid_cli.steps.embeddings import skip_rows

if TYPE_CHECKING:  # the filters are loaded where a run has them
    from clipcid_cli.steps.balance.filters.against import NearReferences
    from clipcid_cli.steps.balance.filters.captions import CaptionWindow
    from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap
    from clipcid_cli.steps.balance.filters.near import FarImages


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is to be written: what each filter has found, sets, the forest they were made from, and which rows are kept."""

    run: BalanceRun  # with the rows that filters have left to be searched
    against: NearReferences | None
    captions: CaptionWindow | None
    far: FarImages | None
    sets: Sets
    forest: Edges
    compared: ComparedLinkage | NotComputed
    cap: ClusterCap | None
    is_kept: BoolArray  # in the end, bool [N]
    audit: Audit | None

    @property
    def filters(self) -> list[NearReferences | CaptionWindow | FarImages | ClusterCap]:
        """Those of the run, in their order."""
        filters = (self.against, self.captions, self.far, self.cap)
        return [dropping for dropping in filters if dropping is not None]

    @property
    def searches(self) -> frozenset[str]:
        """The names of the comparisons with references."""
        return frozenset[str]().union(*(kind.nearest.searches for kind in (self.against, self.far) if kind is not None))


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
    against, captions = _find_filtered(run)
    run = _leave_out(run, [dropping.is_dropped for dropping in (against, captions) if dropping is not None])
    far = _find_far(run)
    run = _leave_out(run, [] if far is None else [far.is_dropped])
    if run.clusters is not None:
        from clipcid_cli.steps.balance.filters.cluster_cap import warn_of_few

        warn_of_few(run.settings, run.clusters, run.rows.num_searched)
    sets, forest, reused = make_sets(run)
    if reused:
        reporting.note("The forest of these embeddings exists: keep list, curve and report are made from it.")
    compared = compare_linkages(run, sets, forest)
    cap = _cap_clusters(run, sets)
    is_kept = sets.kept if cap is None else sets.kept & ~cap.is_dropped
    audit = _audit(run, sets, is_kept)
    context.barrier()  # until here another process may read what it has mapped
    return Outcome(run, against, captions, far, sets, forest.edges, compared, cap, is_kept, audit)


def _find_filtered(run: BalanceRun) -> tuple[NearReferences | None, CaptionWindow | None]:
    """Find what is dropped before repeats are searched."""
    against = captions = None
    if run.settings.against:
        from clipcid_cli.steps.balance.filters.against import find_near

        against = find_near(run)
    if run.settings.has_window:
        from clipcid_cli.steps.balance.filters.captions import find_captions

        captions = find_captions(run)
    return against, captions


def _find_far(run: BalanceRun) -> FarImages | None:
    """Find what of the rest is far from all targets."""
    if not run.settings.near:
        return None
    from clipcid_cli.steps.balance.filters.near import find_far

    return find_far(run)


def _leave_out(run: BalanceRun, dropped: list[BoolArray]) -> BalanceRun:
    """Leave out of the search what filters drop: each is a mask over the rows of the keep list, bool [N]."""
    if not dropped:
        return run
    is_left = ~np.logical_or.reduce(dropped)
    if not is_left.any():
        raise ClipcidError(
            f"All {len(is_left):,} images are dropped before repeats are searched.",
            "Give a smaller --against-threshold, or a wider window of caption similarity.",
        )
    return dataclasses.replace(run, rows=run.rows.restrict(run.shared, is_left))


def _cap_clusters(run: BalanceRun, sets: Sets) -> ClusterCap | None:
    """Find what is dropped after repeats."""
    if run.clusters is None:
        return None
    from clipcid_cli.steps.balance.filters.cluster_cap import cap_clusters

    return cap_clusters(run, run.clusters, sets.kept)


def _audit(run: BalanceRun, sets: Sets, is_kept: BoolArray) -> Audit | None:
    """Estimate what a search in partitions has missed."""
    if run.settings.neighbors != "partitioned" or sets.threshold is None:
        return None
    from clipcid_cli.steps.balance.partition import audit_kept

    with timed(run.seconds, "audit"):
        return audit_kept(run, np.flatnonzero(is_kept).astype(sets.labels.dtype), sets.threshold)
