"""`balance`: embeddings → forest → sets → keep list, curve, report, and new shards where requested."""

from __future__ import annotations

import dataclasses
import time

import msgspec
import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import remove_copies
from clipcid_cli.formats.output import Output, list_differences
from clipcid_cli.formats.results.forest import CURVE, ROW_FILES, SET_TABLE, forest_path, write_row_files
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.runtime.libraries import keep_few_kernels
from clipcid_cli.runtime.precision import choose_coarse_dtype
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalancePlan, BalanceRows, BalanceRun, read_rows
from clipcid_cli.steps.balance.cost import estimate_cost
from clipcid_cli.steps.balance.filters.against import find_near
from clipcid_cli.steps.balance.filters.captions import find_captions
from clipcid_cli.steps.balance.filters.cluster_cap import cap_clusters
from clipcid_cli.steps.balance.partition import audit_kept
from clipcid_cli.steps.balance.plan import identify, list_row_files, make_plan
from clipcid_cli.steps.balance.report import REPORT, has_new_pictures
from clipcid_cli.steps.balance.result import BalanceCost, BalanceResult
from clipcid_cli.steps.balance.samples import validate_data_there
from clipcid_cli.steps.balance.sets import compare_linkages, make_sets
from clipcid_cli.steps.balance.shared_arrays import SharedArrays
from clipcid_cli.steps.balance.write import Outcome, write
from clipcid_cli.steps.balance.write_lists import validate_new, write_kept
from clipcid_cli.steps.balance.write_shards import write_shards
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.inputs import skip_rows
from clipcid_cli.steps.settings.balance import BalanceSettings


def run(settings: BalanceSettings) -> BalanceResult | BalanceCost | EmbedCost:
    """Balance a data set; with ``--dry-run`` estimate what that takes, or first the embeddings that it lacks."""
    with open_dist_context(settings.device) as context:
        plan = make_plan(settings, context)
        if isinstance(plan, EmbedCost):
            return plan
        if settings.neighbors == "partitioned":  # the tiles of partitions are of many sizes
            keep_few_kernels()
        if settings.dry_run:
            return estimate_cost(plan)
        with claim_output(context, context.on_rank0(lambda: identify(plan))) as output:
            result = context.on_rank0(lambda: _take_or_start(plan, output))
            if result is None:
                balance = begin(plan, output)
                found = _compute(balance)
                context.barrier()  # until here another process may read what it has mapped
                result = context.on_rank0(lambda: write(balance, found))
            context.on_rank0(lambda: write_kept(plan))
            if settings.write_shards is not None:
                write_shards(plan, settings.write_shards)
        files = {
            "keep_list": plan.keep_list,
            "forest": forest_path(plan.folder, settings.forest_kind),
            "sets": plan.folder / SET_TABLE,
            "curve": plan.folder / CURVE,
            "report": plan.folder / REPORT,
            "sidecar": plan.folder / "balance.json",
            "keys": settings.write_keys,
            "pairs": settings.write_pairs,
            "uids": settings.write_uids,
            "shards": settings.write_shards,
        }
        written = {name: str(path) for name, path in files.items() if path is not None}
        return msgspec.structs.replace(result, files=written)


def _take_or_start(plan: BalancePlan, output: Output[BalanceSidecar]) -> BalanceResult | None:
    """Return the result that is there already, unless its report can now show more; else start the output."""
    if output.finished is not None:
        if not has_new_pictures(plan, output.finished):
            reporting.note(f"{plan.folder} already holds this result.")
            return msgspec.convert(output.finished.result, BalanceResult)
        reporting.note("Pictures missing from the report can be read now: it is rewritten.")
    else:
        validate_new(plan.settings)
    if output.differences:
        told = list_differences(output.differences)
        reporting.note(f"The result in {plan.folder}, of other settings or inputs, will be replaced:\n{told}")
    validate_data_there(plan)
    output.start()
    write_row_files(output.work / ROW_FILES, list_row_files(plan.embeddings))
    SharedArrays(plan.context, output.work).clear()
    remove_copies(output.work)  # of a search in partitions that was killed
    plan.embeddings.validate_unique_keys()
    return None


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


def begin(plan: BalancePlan, output: Output[BalanceSidecar]) -> BalanceRun:
    """Read all rows once, and drop what filters drop: each is a mask over the rows of the keep list."""
    began = time.perf_counter()
    settings, shared = plan.settings, SharedArrays(plan.context, output.work)
    with timed(plan.seconds, "search"):
        rows = read_rows(shared, plan.embeddings.rows(Kind.IMAGES))
    run = BalanceRun(
        **vars(plan),
        output=output,
        shared=shared,
        rows=rows,
        skips=_count_skipped(plan, rows),
        scan=choose_coarse_dtype(settings.precision, plan.context.device),
        began=began,
    )
    near = find_near(run) if run.references else None
    captions = find_captions(run) if settings.has_window else None
    is_left = np.ones(len(rows), np.bool_)
    for found in (near, captions):
        if found is not None:
            is_left &= ~found.is_dropped
    if not is_left.any():
        raise ClipcidError(
            f"All {len(rows):,} images are dropped before repeats are searched.",
            "Give a smaller --against-threshold, or a wider window of caption similarity.",
        )
    if settings.has_filters:
        rows = rows.restrict(shared, is_left)
    if plan.clusters is not None:
        plan.clusters.warn_of_few(plan, rows.num_searched)
    return dataclasses.replace(run, rows=rows, near=near, captions=captions)


def _compute(run: BalanceRun) -> Outcome:
    """Find what is kept, on all processes."""
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
    return Outcome(sets, forest, other, cap, is_kept, audit)
