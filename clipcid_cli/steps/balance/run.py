"""`balance`: embeddings → forest → sets → keep list, curve, report, and new shards where requested."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.forest import forest_path
from clipcid_cli.formats.results.row_files import ROW_FILES, write_row_files
from clipcid_cli.formats.results.sets import CURVE, SET_TABLE
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.formats.work_directory import KEEP_LIST, WorkDirectory
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.runtime.memory import keep_few_kernels
from clipcid_cli.steps.balance.audit import audit_kept
from clipcid_cli.steps.balance.balance_run import BalanceRun, begin
from clipcid_cli.steps.balance.cost import estimate_cost
from clipcid_cli.steps.balance.filters.against import forget_others
from clipcid_cli.steps.balance.filters.cluster_cap import FoundClusters, cap_clusters
from clipcid_cli.steps.balance.filters.references import open_references, plan_references
from clipcid_cli.steps.balance.plan import (
    Plan,
    check_named,
    check_sizes,
    find_embeddings,
    identify,
    list_row_files,
    make_plan,
)
from clipcid_cli.steps.balance.report import REPORT, has_new_pictures, write_report
from clipcid_cli.steps.balance.result import Outcome, find_warnings, summarise
from clipcid_cli.steps.balance.sets import compare_linkages, make_sets
from clipcid_cli.steps.balance.tables import write_tables
from clipcid_cli.steps.balance.write_lists import write_kept
from clipcid_cli.steps.balance.write_shards import write_shards
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.shared import given_flags
from clipcid_cli.steps.shared_arrays import clear_shared


def run(settings: BalanceSettings, reporter: Reporter) -> dict[str, Any]:
    """Balance a data set; return the fields of `BalanceResult`, and ``files``: the path of each file by its name."""
    with open_machine(settings.device) as machine:
        started = time.perf_counter()
        clusters = machine.on_main(lambda: check_named(settings, reporter))
        embeddings = find_embeddings(settings, machine, reporter)
        seconds = {"embed": time.perf_counter() - started}
        plan = machine.on_main(lambda: make_plan(settings, embeddings, clusters))
        if settings.neighbors == "partitioned":  # the tiles of partitions are of many sizes
            keep_few_kernels()
        if settings.dry_run:
            planned = plan_references(settings, machine, embeddings, reporter)
            return machine.on_main(lambda: estimate_cost(plan, planned, machine, reporter))
        references = open_references(settings, machine, embeddings, reporter)
        wanted = machine.on_main(lambda: identify(plan, references))
        with claim_output(machine, plan.folder, "balance", BalanceSidecar, **wanted) as output:
            result = machine.on_main(lambda: _find_result(plan, output.finished, reporter))
            if result is None:
                machine.on_main(lambda: _start(plan, output))
                balance = begin(plan, references, machine, output, seconds, reporter)
                result = _write(balance, _compute(balance, plan.clusters))
            keep_list = plan.folder / KEEP_LIST
            files = machine.on_main(lambda: _name_files(plan) | write_kept(settings, embeddings, keep_list, reporter))
            if settings.write_shards is not None:
                write_shards(plan, settings.write_shards, keep_list, machine, reporter)
                files["shards"] = settings.write_shards
        return result | {"files": {name: str(path) for name, path in files.items()}}


def _find_result(plan: Plan, finished: BalanceSidecar | None, reporter: Reporter) -> dict[str, Any] | None:
    """Return the result that is there already, unless its report can now show more."""
    if finished is None:
        return None
    if has_new_pictures(plan, finished):
        reporter.note("Pictures that the report does not show can be read now: it is written again.")
        return None
    reporter.note(f"{plan.folder} already holds this result.")
    return finished.result


def _name_files(plan: Plan) -> dict[str, Path]:
    return {
        "keep_list": plan.folder / KEEP_LIST,
        "forest": forest_path(plan.folder, plan.settings.forest_kind),
        "sets": plan.folder / SET_TABLE,
        "curve": plan.folder / CURVE,
        "report": plan.folder / REPORT,
        "sidecar": plan.folder / "balance.json",
    }


def _start(plan: Plan, output: Output[BalanceSidecar]) -> None:
    check_sizes(plan)
    output.start()
    write_row_files(output.work / ROW_FILES, list_row_files(plan.embeddings))
    clear_shared(output.work)
    plan.embeddings.refuse_repeated_keys()


def _compute(run: BalanceRun, clusters: FoundClusters | None) -> Outcome:
    """Find what is kept, on all processes."""
    sets, forest, reused = make_sets(run)
    if reused:
        run.reporter.note("The forest of these embeddings exists: keep list, curve and report are made from it.")
    other = compare_linkages(run, sets, forest)
    cap = None if clusters is None else cap_clusters(run, clusters, sets.kept)
    is_kept = sets.kept if cap is None else sets.kept & ~cap.is_dropped
    audit = None
    if run.settings.neighbors == "partitioned" and sets.threshold is not None:
        kept = np.flatnonzero(is_kept).astype(sets.labels.dtype)
        with run.timing("audit"):
            audit = audit_kept(run, run.rows, kept, sets.threshold)
    return Outcome(sets, forest, other, cap, is_kept, audit)


def _write(run: BalanceRun, found: Outcome) -> dict[str, Any]:
    """Write the output on the first process; return its result on all."""

    def write() -> dict[str, Any]:
        warnings = find_warnings(run, found.sets)
        for warning in warnings:
            run.reporter.warn(warning)
        measured = write_tables(run, found)
        result = summarise(run, found)
        pictures = write_report(run, found, measured, result, warnings)
        result = dataclasses.replace(result, seconds=run.phases())
        output = run.output
        output.commit(
            counts={"read": run.embeddings.num_rows, "used": len(run.rows), "skipped": result.skipped},
            seconds=result.seconds,
            outputs=[record(output.work / name, output.work) for name in (KEEP_LIST, ROW_FILES)],
            embeddings=WorkDirectory(run.settings.work).name_of(run.embeddings.folder),
            flags=given_flags(run.settings),
            pictures=pictures,
            result=dataclasses.asdict(result),
        )
        if run.near is None:
            forget_others(output.folder)
        return dataclasses.asdict(result)

    run.machine.barrier()  # until here another process may read what it has mapped
    return run.machine.on_main(write)
