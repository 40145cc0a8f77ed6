"""From rows to what is kept, on all processes: filters, sets, the limit on clusters, the audit."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.near.exact import BoolArray
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.keep_list import BalanceSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.precision import choose_coarse_dtype
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalancePlan, BalanceRows, BalanceRun, read_rows
from clipcid_cli.steps.balance.filters.against import NearReferences, find_near
from clipcid_cli.steps.balance.filters.captions import CaptionWindow, find_captions
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap, cap_clusters, warn_of_few
from clipcid_cli.steps.balance.partition import audit_kept
from clipcid_cli.steps.balance.result import Audit
from clipcid_cli.steps.balance.sets import NotComputed, OtherLinkage, Sets, compare_linkages, make_sets
from clipcid_cli.steps.balance.shared_arrays import SharedArrays
from clipcid_cli.steps.embeddings import skip_rows


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is to be written: what each filter has found, sets, the forest they were made from, and which rows are kept."""

    run: BalanceRun  # with the rows that filters have left to be searched
    near: NearReferences | None
    captions: CaptionWindow | None
    sets: Sets
    forest: Edges
    other: OtherLinkage | NotComputed
    cap: ClusterCap | None
    is_kept: BoolArray  # in the end, bool [N]
    audit: Audit | None

    @property
    def filters(self) -> list[NearReferences | CaptionWindow | ClusterCap]:
        """Those of the run, in their order."""
        return [each for each in (self.near, self.captions, self.cap) if each is not None]


def begin(plan: BalancePlan, output: Output[BalanceSidecar]) -> BalanceRun:
    """Read all rows once."""
    began = time.perf_counter()
    shared = SharedArrays(plan.context, output.work)
    with timed(plan.seconds, "search"):
        rows = read_rows(shared, plan.embeddings.rows(Kind.IMAGES))
    planned = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return BalanceRun(
        **planned,
        output=output,
        shared=shared,
        rows=rows,
        skips=_count_skipped(plan, rows),
        scan=choose_coarse_dtype(plan.settings.precision, plan.context.device),
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


def compute(run: BalanceRun) -> Outcome:
    """Find what is kept."""
    near = find_near(run) if run.references else None
    captions = find_captions(run) if run.settings.has_window else None
    run = _leave_out(run, [each.is_dropped for each in (near, captions) if each is not None])
    if run.clusters is not None:
        warn_of_few(run, run.clusters, run.rows.num_searched)
    sets, forest, reused = make_sets(run)
    if reused:
        reporting.note("The forest of these embeddings exists: keep list, curve and report are made from it.")
    other = compare_linkages(run, sets, forest)
    cap = None if run.clusters is None else cap_clusters(run, run.clusters, sets.kept)
    is_kept = sets.kept if cap is None else sets.kept & ~cap.is_dropped
    audit = None
    if run.settings.neighbors == "partitioned" and sets.threshold is not None:
        with timed(run.seconds, "audit"):
            audit = audit_kept(run, np.flatnonzero(is_kept).astype(sets.labels.dtype), sets.threshold)
    return Outcome(run, near, captions, sets, forest, other, cap, is_kept, audit)


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
