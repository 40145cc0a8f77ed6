"""From rows to centroids: k-means on all processes, with a checkpoint after each iteration that can be resumed from."""

from __future__ import annotations

from pathlib import Path

import torch

from clipcid_cli.algorithms.kmeans.lloyd import LloydState, Processes, run_lloyd
from clipcid_cli.algorithms.kmeans.seeding import first_centroids
from clipcid_cli.formats.arrays import load_arrays, save_arrays
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_for_rows
from clipcid_cli.runtime.pipeline import thread_map, threads_for_batches
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.steps.cluster.plan import ClusterPlan
from clipcid_cli.steps.reporting import Reporter


def train_centroids(plan: ClusterPlan, machine: Machine, progress: Path, reporter: Reporter) -> LloydState:
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
