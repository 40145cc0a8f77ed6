"""`cluster`: kept embeddings → centroids by k-means → the nearest centroids of every image and caption."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from clipcid_cli.algorithms.kmeans.lloyd import LloydState, Processes, run_lloyd
from clipcid_cli.algorithms.kmeans.seeding import first_centroids
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.clusters import CENTROIDS, PROGRESS, TABLE, join_parts, part_bounds, top_paths
from clipcid_cli.formats.sidecar import ClusterSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.memory import memory_for_rows
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.cluster.assign import assign_clusters, search_width, summarise, towers_of
from clipcid_cli.steps.cluster.cost import estimate_cost
from clipcid_cli.steps.cluster.plan import ClusterPlan, make_plan
from clipcid_cli.steps.cluster.result import ClusterCost, ClusterResult
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.shared import given_flags


def run(settings: ClusterSettings, reporter: Reporter) -> ClusterResult | ClusterCost:
    """Cluster embeddings."""
    seconds = dict[str, float]()
    with open_machine(settings.device) as machine:
        with timed(seconds, "read"):
            plan = machine.on_main(lambda: make_plan(settings, reporter))
        if settings.dry_run:
            return estimate_cost(plan, machine, reporter)
        with claim_output(machine, plan.folder, "cluster", ClusterSidecar, **plan.wanted) as output:
            if output.finished is not None:
                reporter.note(f"These clusters are in {plan.folder} already.")
                result = msgspec.convert(output.finished.result, ClusterResult)
            else:
                machine.on_main(output.start)
                with timed(seconds, "kmeans"):
                    state = _train(plan, machine, output.work / PROGRESS, reporter)
                with timed(seconds, "assign"):
                    assign_clusters(machine, plan.rows, state.centroids_KD, output.work, reporter)
                result = machine.on_main(lambda: _write(plan, state, output, seconds, reporter))
        names = {"centroids": CENTROIDS, "clusters": TABLE, "sidecar": "cluster.json"}
        return msgspec.structs.replace(result, files={name: str(plan.folder / file) for name, file in names.items()})


def _train(plan: ClusterPlan, machine: Machine, progress: Path, reporter: Reporter) -> LloydState:
    """Run k-means until no centroid moves, or all iterations are done; every process takes its even share of the rows."""
    settings, trained, num_rows = plan.settings, plan.trained, len(plan.rows)

    def begin() -> LloydState:
        found = load_arrays(progress)
        if found is None:
            return LloydState(first_centroids(trained, plan.num_clusters, settings.seed))
        iterations = int(found["iterations"])
        reporter.note(f"Resuming after {iterations} iterations.")
        return LloydState(torch.from_numpy(found["centroids"]), iterations, bool(found["converged"]))

    state, scan = machine.on_main(begin), choose_scan(settings.precision, machine.device)
    used = "all images" if len(trained) == num_rows else f"{len(trained):,} of {num_rows:,} images (--train-rows)"
    reporter.note(f"Centroids are computed from {used}, compared in {scan.name} ({scan.reason}) and decided in fp64.")
    states = run_lloyd(
        trained,
        state,
        iterations=settings.iterations,
        dtype=scan.dtype,
        device=machine.device,
        processes=Processes(
            machine.share,
            machine.sum_,
            machine.gather,
            lambda compute, runs: thread_map(compute, runs, threads_for_batches(machine.device)),
        ),
        kept_bytes=memory_for_rows(machine.device),
    )
    with reporter.progress("k-means", settings.iterations - state.iterations, "iterations") as bar:
        for state in states:
            if machine.is_main and state.resumable:
                so_far = {"iterations": state.iterations, "converged": state.converged}
                save_arrays(progress, {"centroids": state.centroids_KD.numpy(), **so_far})
            bar.advance()
            bar.show(similarity=state.similarity, **({"empty": state.num_empty} if state.num_empty else {}))
    return state


def _write(
    plan: ClusterPlan, state: LloydState, output: Output[ClusterSidecar], seconds: dict[str, float], reporter: Reporter
) -> ClusterResult:
    """Write centroids and table, and finish the output; return its result."""
    rows, embeddings, num_clusters = plan.rows, plan.rows.embeddings, plan.num_clusters
    with timed(seconds, "write"):
        write_npy(output.work / CENTROIDS, state.centroids_KD.numpy())
        join_parts(output.work, part_bounds(len(rows)), rows.keys)
        objective, sizes, temperatures = summarise(rows, num_clusters, output.work)
    result = ClusterResult(
        images=len(rows),
        clusters=num_clusters,
        objective=objective,
        empty_clusters=int((sizes == 0).sum()),
        largest_cluster=int(sizes.max()),
        skipped=rows.skips.counts,
        iterations=state.iterations,
        repair=rows.repair if embeddings.image_map is not None else None,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )
    if result.empty_clusters:
        reporter.warn(
            f"{result.empty_clusters:,} of {num_clusters:,} clusters are empty: the data has hardly more "
            "different images than clusters, or fewer. Use a smaller --num-clusters."
        )
    arrays = [path.name for tower in towers_of(rows) for path in top_paths(output.work, tower)]
    output.commit(
        counts={"read": embeddings.num_rows, "used": len(rows), "skipped": rows.skips.counts},
        seconds=seconds,
        outputs=[record(output.work / name, output.work) for name in (CENTROIDS, TABLE, *arrays)],
        embeddings=WorkDirectory(plan.settings.work).name_of(embeddings.folder),
        keep_list=None if rows.keep_list is None else record(rows.keep_list),
        repair=None if embeddings.image_map is None else embeddings.image_map.record,
        flags=given_flags(plan.settings),
        model=None if embeddings.sidecar is None else embeddings.sidecar.model,
        num_nearest=search_width(num_clusters),
        temperatures=temperatures,
        result=result,
    )
    return result
