"""`cluster --dry-run`: what a run takes, by formula and one timed batch of each kind of work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from clipcid_cli.algorithms.kmeans.centroids import rows_as_centroids
from clipcid_cli.algorithms.near.block import make_block
from clipcid_cli.algorithms.near.nearest import NearestCentroid, top_nearest
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_for_rows
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.cluster.plan import ClusterPlan
from clipcid_cli.steps.cluster.result import ClusterCost
from clipcid_cli.steps.reporting import Reporter, format_duration

# Rows and centroids of the timed batch.
_BATCH = 1024
_CENTROIDS = 4096
_SHORTEST = 0.1
# Libraries, products and other work in progress, and what a row takes in addition to its embedding.
_BYTES_OF_LIBRARIES = 450 * 2**20
_BYTES_A_ROW = 24


def estimate_cost(plan: ClusterPlan, machine: Machine, reporter: Reporter) -> ClusterCost:
    """Say what the run takes, without writing anything."""
    settings = plan.settings
    rows = plan.rows
    num_trained = len(plan.trained)
    num_clusters = plan.num_clusters
    width = rows.width
    scan = choose_scan(settings.precision, machine.device).dtype
    iteration, assign = machine.on_main(lambda: _measure(plan, scan, machine))
    iteration *= num_trained
    assign *= len(rows) * len(rows.towers)
    kept = min(memory_for_rows(machine.device), (2 + scan.itemsize) * width * num_trained // machine.size)
    memory = num_clusters * width * (4 + 8 + scan.itemsize) + kept
    memory += _BYTES_OF_LIBRARIES + _BYTES_A_ROW * len(rows)
    reporter.note(
        f"{num_trained:,} images × {num_clusters:,} clusters × width {width}: {format_duration(iteration)} for an "
        f"iteration, at most {format_duration(iteration * settings.iterations)} for {settings.iterations} (fewer and fewer "
        f"images are compared again), {format_duration(assign)} to assign {len(rows):,}; {memory / 2**30:.3g} GiB a process "
        "above the mapped files."
    )
    seconds = {"kmeans_least": iteration, "kmeans_most": iteration * settings.iterations, "assign": assign}
    return ClusterCost(
        images=len(rows),
        clusters=num_clusters,
        flop=2 * num_trained * num_clusters * width * settings.iterations,
        memory_bytes=memory,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def _measure(plan: ClusterPlan, scan: torch.dtype, machine: Machine) -> tuple[float, float]:
    """Time a batch of rows against some rows as centroids: seconds a row, of an iteration and of the assignment."""
    device, rows = machine.device, plan.rows
    chosen = np.linspace(0, len(rows) - 1, min(plan.num_clusters, _CENTROIDS), dtype=np.int64)
    centroids_CD = rows_as_centroids(rows, chosen).to(device)
    batch_BD = torch.from_numpy(rows.features(np.arange(min(len(rows), _BATCH)))).to(device)
    nearest = NearestCentroid(centroids_CD, scan)
    block = make_block(np.arange(len(batch_BD)), batch_BD, scan)

    def seconds_a_row(work: Callable[[], object]) -> float:
        return time_trial(work, device, at_least=_SHORTEST).seconds / len(batch_BD) / machine.size

    prepare = seconds_a_row(lambda: make_block(block.rows, batch_BD, scan))
    iterate = seconds_a_row(lambda: nearest.of(block))
    assign = seconds_a_row(lambda: top_nearest(batch_BD, centroids_CD, plan.num_nearest))
    scale = plan.num_clusters / len(centroids_CD)
    return prepare + iterate * scale, assign * scale
