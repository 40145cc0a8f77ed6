"""`cluster --dry-run`: what a run takes, by formula and one timed batch of each kind of work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from clipcid_cli.algorithms.kmeans.seeding import rows_as_centroids
from clipcid_cli.algorithms.near.block import make_block
from clipcid_cli.algorithms.near.nearest import NearestCentroid, top_nearest
from clipcid_cli.runtime.machine import Machine, memory_for_rows
from clipcid_cli.runtime.precision import choose_scan
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.cluster.assign import search_width
from clipcid_cli.steps.cluster.plan import ClusterPlan
from clipcid_cli.steps.cluster.result import ClusterCost
from clipcid_cli.steps.cluster.rows import ClusterRows
from clipcid_cli.steps.reporting import Reporter, format_duration

_BATCH, _CENTROIDS = 1024, 4096
_SHORTEST = 0.1
# Libraries, products and other work in progress, and what a row takes in addition to its embedding.
_BYTES_OF_LIBRARIES = 450 * 2**20
_BYTES_A_ROW = 20


def estimate_cost(plan: ClusterPlan, machine: Machine, reporter: Reporter) -> ClusterCost:
    """Say what the run takes, without writing anything."""
    settings, rows, num_trained, num_clusters = plan.settings, plan.rows, len(plan.trained), plan.num_clusters
    width = rows.width
    scan = choose_scan(settings.precision, machine.device).dtype
    iteration, assign = machine.on_main(lambda: _measure(rows, num_clusters, scan, machine))
    iteration *= num_trained
    assign *= len(rows) * (2 if rows.embeddings.has_texts else 1)
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


def _measure(rows: ClusterRows, num_clusters: int, scan: torch.dtype, machine: Machine) -> tuple[float, float]:
    """Time a batch of rows against some rows as centroids.

    Returns:
        Seconds a row, of an iteration and of the assignment.
    """
    device = machine.device
    chosen = np.linspace(0, len(rows) - 1, min(num_clusters, _CENTROIDS), dtype=np.int64)
    centroids_CD = rows_as_centroids(rows, chosen).to(device)
    batch_BD = torch.from_numpy(np.array(rows.features(0, min(len(rows), _BATCH)))).to(device)
    nearest, m = NearestCentroid(centroids_CD, scan), min(search_width(num_clusters), len(centroids_CD))
    block = make_block(np.arange(len(batch_BD)), batch_BD, scan)

    def seconds_a_row(work: Callable[[], object]) -> float:
        return time_trial(work, device, at_least=_SHORTEST).seconds / len(batch_BD) / machine.size

    prepare = seconds_a_row(lambda: make_block(block.rows, batch_BD, scan))
    iterate = seconds_a_row(lambda: nearest.of(block))
    assign = seconds_a_row(lambda: top_nearest(batch_BD, centroids_CD, m))
    scale = num_clusters / len(centroids_CD)
    return prepare + iterate * scale, assign * scale
