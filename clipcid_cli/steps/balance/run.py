"""`balance`: embeddings → forest → sets → keep list, curve, report, and new shards where requested."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from clipcid_cli.formats.arrays import map_strings
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.embeddings.folder import EmbeddingFile, Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import identity_of, record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.keep_list import read_keep_list, write_keep_list
from clipcid_cli.formats.results.row_files import ROW_FILES, write_row_files
from clipcid_cli.formats.results.sets import CURVE, SET_TABLE, SetTable, write_curve, write_set_table
from clipcid_cli.formats.sidecar import BalanceSidecar
from clipcid_cli.formats.work_directory import KEEP_LIST, WorkDirectory
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.memory import keep_few_kernels
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.balance.audit import Audit, audit_kept
from clipcid_cli.steps.balance.compare_linkage import compare_linkages
from clipcid_cli.steps.balance.context import Context
from clipcid_cli.steps.balance.cost import estimate_cost
from clipcid_cli.steps.balance.filters.against import forget_others
from clipcid_cli.steps.balance.filters.cluster_cap import ClusterCap, FoundClusters, cap_clusters, find_clusters
from clipcid_cli.steps.balance.filters.keep_rows import KeepRows, list_rows
from clipcid_cli.steps.balance.filters.references import Reference, open_references, plan_references, refuse_missing
from clipcid_cli.steps.balance.filters.select import apply_filters
from clipcid_cli.steps.balance.pairs import NotComputed
from clipcid_cli.steps.balance.report import has_new_pictures, write_report
from clipcid_cli.steps.balance.result import REPORT, explain_unread, find_warnings, name_files, summarise
from clipcid_cli.steps.balance.rows import (
    count_skipped,
    find_embeddings,
    find_rows,
    holds_earlier,
    list_row_files,
    needs_texts,
    output_identity,
)
from clipcid_cli.steps.balance.samples import open_for_sizes, require_data
from clipcid_cli.steps.balance.sections.chains import measure_sets
from clipcid_cli.steps.balance.sets import Sets, make_sets
from clipcid_cli.steps.balance.write_lists import check_targets, check_uids, write_kept
from clipcid_cli.steps.balance.write_shards import tar_shards, write_shards
from clipcid_cli.steps.chunks import SearchRun
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.settings.shared import given_flags
from clipcid_cli.steps.shared_arrays import clear_shared


def run(settings: BalanceSettings, reporter: Reporter) -> dict[str, Any]:
    """Balance a data set.

    Returns:
        The JSON object: ``images, searched, kept, keep_ratio, threshold, components, largest_component, uncovered_ratio,
        other_linkage{linkage, kept, uncovered_ratio}, neighbors, audit{sampled, kept, near, rate, low, high},
        dropped_by{reference, caption, repeat, cluster}, against{threshold, dropped, references[{name, rows, near,
        nearest}]}, caption_window{min, max, inside, below, above, without}, cluster_cap{most, clusters, capped, dropped,
        largest}, skipped{}, seconds{embed, search, write}, files{}``. ``searched`` counts the images that references and
        caption window leave. ``uncovered_ratio`` is the share of the dropped repeats that are farther than the threshold
        from their representative.
        ``other_linkage`` is what the other linkage gives at the same threshold, null where that is not computed. ``audit``
        is null for exact neighbors; for partitioned ones it holds how many of the sampled kept images have another kept one
        within the threshold, the rate and the ends of its 95 % interval. ``against`` holds for each reference its rows, the
        images near one of them, and those for which it is the nearest reference; ``cluster_cap`` the clusters of the
        images that repeats have left, how many had more images than `most`, and the size of the largest before. These three
        are null where they are not asked for.
    """
    with open_machine(settings.device) as machine:
        started = time.perf_counter()
        machine.on_main(lambda: check_targets(settings))
        machine.on_main(lambda: refuse_missing(settings))
        work, clusters = WorkDirectory(settings.work), machine.on_main(lambda: find_clusters(settings, reporter))
        found = find_embeddings(settings, machine, reporter)
        if settings.neighbors == "partitioned":  # the tiles of partitions are of many sizes
            keep_few_kernels()
        cache = None if settings.dry_run else work.fingerprints
        embeddings = open_embeddings(found, settings.keys, settings.npz_array, cache)
        seconds = {"embed": time.perf_counter() - started}
        data, shards = None, list[Shard]()
        if settings.write_shards is not None:
            data = require_data(settings, embeddings, "--write-shards")
            shards = tar_shards(data, settings.write_shards)
        machine.on_main(lambda: check_uids(settings, embeddings))
        if needs_texts(settings):
            embeddings.rows(Kind.TEXTS)  # refuses those without, before anything is searched
        if settings.dry_run:
            open_for_sizes(settings, embeddings)  # refuses unknown data
            planned = plan_references(settings, machine, embeddings, reporter)
            return estimate_cost(settings, machine, embeddings, planned, clusters, reporter)
        references = open_references(settings, machine, embeddings, reporter)
        folder, identity = work.balance, machine.on_main(lambda: output_identity(settings, embeddings))
        opened = [embeddings, *(each.embeddings for each in references)]
        # `embed` has made the keys of its own folders.
        identity["keys"] = settings.keys if any(each.sidecar is None for each in opened) else None
        identity["max_per_cluster"] = settings.max_per_cluster
        identity["clusters"] = None if clusters is None else clusters.identity
        identity["against"] = [[each.name, each.identity] for each in references] or None
        identity["against_threshold"] = settings.reference_distance if references else None
        fingerprints = machine.on_main(embeddings.fingerprints)
        may_grow = machine.on_main(lambda: holds_earlier(folder, embeddings, settings.overwrite))
        with claim_output(
            machine,
            folder,
            "balance",
            BalanceSidecar,
            settings=identity,
            inputs=fingerprints,
            overwrite=settings.overwrite,
            may_differ=frozenset(identity) | ({"inputs"} if may_grow else set()),
        ) as output:
            finished = output.finished
            if machine.on_main(lambda: has_new_pictures(settings, embeddings, output.finished)):
                reporter.note("Pictures that the report does not show can be read now: it is written again.")
                finished = None
            if finished is not None:
                reporter.note(f"{folder} already holds this result.")
                result = finished.result
            else:
                result = _balance(settings, machine, embeddings, references, clusters, output, seconds, reporter)
            result["files"] = name_files(folder, settings.forest_kind)
            keep_list = folder / KEEP_LIST
            result["files"] |= machine.on_main(lambda: write_kept(settings, embeddings, keep_list, reporter))
            if settings.write_shards is not None and data is not None:
                write_shards(
                    machine,
                    data,
                    shards,
                    read_keep_list(keep_list),
                    record(keep_list),
                    settings.write_shards,
                    overwrite=settings.overwrite,
                    reporter=reporter,
                )
                result["files"]["shards"] = str(settings.write_shards)
        return result


def _balance(
    settings: BalanceSettings,
    machine: Machine,
    embeddings: Embeddings,
    references: list[Reference],
    clusters: FoundClusters | None,
    output: Output[BalanceSidecar],
    seconds: dict[str, float],
    reporter: Reporter,
) -> dict[str, Any]:
    started = time.perf_counter()
    data = open_for_sizes(settings, embeddings)
    machine.on_main(output.start)
    machine.on_main(lambda: write_row_files(output.work / ROW_FILES, list_row_files(embeddings)))
    machine.on_main(lambda: clear_shared(output.work))
    rows = find_rows(machine, output.work, embeddings.rows(Kind.IMAGES), reporter)
    seconds["search"] = time.perf_counter() - started
    skips = count_skipped(settings, embeddings, rows, reporter)
    machine.on_main(embeddings.refuse_repeated_keys)
    identity = identity_of({}, output.run.inputs)
    scan = choose_scan(settings.precision, machine.device)
    search = SearchRun(machine, output.work, identity, embeddings.width, scan, reporter)
    filters = apply_filters(settings, search, output.folder, embeddings, rows, references)
    inputs = [*output.run.inputs, *filters.rows.describe_choice()]
    if clusters is not None:
        clusters.warn_of_few(settings, len(filters.rows), reporter)
    context = Context(settings, machine, output, embeddings, data, inputs, filters, search, reporter, seconds)
    sets, forest, was_there = make_sets(context)
    if was_there:
        reporter.note("The forest of these embeddings exists: keep list, curve and report are made from it.")
    other = compare_linkages(context, sets, forest)
    if isinstance(other, NotComputed) and sets.threshold is not None:
        reporter.note(f"What --linkage star would keep at this cut-off is not computed: {other.reason}.")
    cap = None if clusters is None else cap_clusters(context, clusters, sets)
    audit = _audit(context, sets, cap)
    result = summarise(settings, sets, other, audit, filters, cap, embeddings, skips)
    warnings = find_warnings(settings, sets)
    for warning in warnings:
        reporter.warn(warning)

    def phases() -> dict[str, float]:
        write = time.perf_counter() - started - seconds["search"] - seconds.get("audit", 0.0)
        return {phase: round(value, 3) for phase, value in (seconds | {"write": write}).items()}

    def write() -> dict[str, Any]:
        listed = list_rows(output.work, filters, sets, cap)
        measured = measure_sets(context, sets)
        _write_tables(context, sets, listed, measured)
        shown = result | {"seconds": phases()}
        pictures = write_report(
            output.work / REPORT, context, forest, sets, listed, measured, cap, other, shown, warnings
        )
        for warning in explain_unread(pictures):
            reporter.warn(warning)
        result["seconds"] = phases()
        output.commit(
            counts={"read": embeddings.num_rows, "used": len(rows), "skipped": result["skipped"]},
            seconds=phases(),
            outputs=[record(output.work / name, output.work) for name in (KEEP_LIST, ROW_FILES)],
            embeddings=WorkDirectory(settings.work).name_of(embeddings.folder),
            flags=given_flags(settings),
            pictures=pictures,
            result=result,
        )
        return result

    machine.barrier()  # until here another process may read what it has mapped
    result = machine.on_main(write)
    if not references:
        machine.on_main(lambda: forget_others(output.folder))
    return result


def _audit(context: Context, sets: Sets, cap: ClusterCap | None) -> Audit | None:
    """Estimate what a search in partitions missed, where one was made and something was to be merged."""
    if context.settings.neighbors == "exact" or sets.threshold is None:
        return None
    started = time.perf_counter()
    is_kept = sets.kept
    if cap is not None:
        is_kept &= ~(cap.dropped if context.rows.positions is None else cap.dropped[context.rows.positions])
    kept = np.flatnonzero(is_kept).astype(sets.labels.dtype)
    audit = audit_kept(context.search, context.rows, kept, sets.threshold)
    context.seconds["audit"] = time.perf_counter() - started
    return audit


def _write_tables(context: Context, sets: Sets, listed: KeepRows, measured: SetTable) -> None:
    """Write the keep list, the sets and the curve."""
    embeddings = context.embeddings

    def map_names(read: Callable[[EmbeddingFile], pa.ChunkedArray]) -> pa.LargeStringArray:
        picked = context.filters.everything.pick((file, read(file)) for file in embeddings.files)
        return map_strings(context.output.work, picked)

    keys = map_names(embeddings.keys_of)
    write_keep_list(
        context.output.work / KEEP_LIST,
        keys=keys,
        shards=map_names(embeddings.shards_of),
        labels=listed.labels,
        representatives=listed.representatives,
        distances=listed.distances,
        more=listed.columns,
    )
    positions = context.rows.positions
    table = measured if positions is None else measured.renumbered(positions)
    write_set_table(context.output.work / SET_TABLE, table, keys)
    write_curve(
        context.output.work / CURVE,
        distances=sets.curve.distance,
        kept=sets.curve.kept,
        largest=sets.curve.largest,
        num_images=len(context.rows),
    )
