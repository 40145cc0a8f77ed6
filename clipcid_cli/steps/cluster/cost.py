"""`cluster --dry-run`: what a run takes, estimated from a second of real work on some of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from clipcid_cli.algorithms.kmeans.nearest import NearestCentroids
from clipcid_cli.algorithms.kmeans.prepared import prepare_rows
from clipcid_cli.algorithms.kmeans.start import CodedRows, code_centroids, nearest_codes
from clipcid_cli.algorithms.kmeans.subspace import (
    SUBSPACE_WIDTH,
    Subspace,
    find_subspace,
    subspace_iterations,
)
from clipcid_cli.algorithms.kmeans.top_nearest import top_nearest
from clipcid_cli.algorithms.near.centroids import centroids_of_sums
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.memory import memory_for_rows
from clipcid_cli.runtime.timing import time_trial
from clipcid_cli.steps.cluster.rows import ClusterRows
from clipcid_cli.steps.cluster.train import choose_format
from clipcid_cli.steps.reporting import Reporter, format_duration
from clipcid_cli.steps.settings.cluster import ClusterSettings

Loaded = TypeVar("Loaded")

_SAMPLE = 1024
_SHORTEST = 0.1
# Libraries, products and other work in progress, and what a row takes in addition to its embedding.
_BYTES_OF_LIBRARIES = 450 * 2**20
_BYTES_A_ROW = 20


def estimate_cost(
    settings: ClusterSettings,
    machine: Machine,
    rows: ClusterRows,
    num_clusters: int,
    num_nearest: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Say what the run takes, without writing anything.

    Args:
        machine: The processes; the first measures.
        num_nearest: Centroids stored for each image.

    Returns:
        The JSON object: ``images, clusters, flop, memory_bytes, seconds{kmeans_least, kmeans_most, assign}``. ``flop`` and
        ``kmeans_most`` are those of products of all rows (of ``--train-rows``) with all centroids in each iteration,
        the first of them in few directions where that gains; ``kmeans_least`` is one iteration in full and those in few
        directions, after which fewer and fewer rows are compared. Memory is that of a process above the mapped files,
        most of it a float32 and a low-precision copy of the centroids and their float64 sums.
    """
    trained = len(rows) if settings.train_rows is None else min(settings.train_rows, len(rows))
    used = rows if trained == len(rows) else rows.sample(trained, settings.seed)
    num_short = subspace_iterations(settings.iterations)
    subspace = machine.on_main(lambda: find_subspace(used, num_clusters)) if num_short else None
    num_short = 0 if subspace is None else num_short
    num_full = settings.iterations - num_short
    flop = 2 * trained * num_clusters * (rows.width * num_full + SUBSPACE_WIDTH * num_short)
    centroids_CD = _some_centroids(settings, rows, num_clusters)
    scan = machine.on_main(lambda: choose_format(settings.precision, rows, machine, centroids_CD)).dtype
    kept = min(memory_for_rows(machine.device), (2 + scan.itemsize) * rows.width * trained // machine.size)
    memory = num_clusters * rows.width * (4 + 8 + scan.itemsize) + kept
    memory += _BYTES_OF_LIBRARIES + _BYTES_A_ROW * len(rows)
    full, in_subspace, assign = machine.on_main(
        lambda: _measure(settings, machine, rows, num_clusters, num_nearest, scan, centroids_CD, subspace)
    )
    full, start = full * trained / len(rows), in_subspace * num_short * trained / len(rows)
    most = start + full * num_full
    first = f"{format_duration(start)} for {num_short} in {SUBSPACE_WIDTH} directions, " if num_short else ""
    reporter.note(
        f"{trained:,} images × {num_clusters:,} clusters × width {rows.width}: {first}{format_duration(full)} for an "
        f"iteration in full, at most {format_duration(most)} for {settings.iterations} (fewer and fewer images are compared "
        f"again), {format_duration(assign)} to assign {len(rows):,}; {memory / 2**30:.3g} GiB a process above the mapped "
        "files."
    )
    seconds = {"kmeans_least": start + full, "kmeans_most": most, "assign": assign}
    return {
        "images": len(rows),
        "clusters": num_clusters,
        "flop": flop,
        "memory_bytes": memory,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def _some_centroids(settings: ClusterSettings, rows: ClusterRows, num_clusters: int) -> torch.Tensor:
    random = np.random.default_rng(settings.seed)
    chosen = np.sort(random.choice(len(rows), min(num_clusters, 4 * _SAMPLE), replace=False))
    sums_CD = torch.from_numpy(rows.features_at(chosen)).double()
    return centroids_of_sums(sums_CD, torch.zeros(sums_CD.shape))


def _measure(
    settings: ClusterSettings,
    machine: Machine,
    rows: ClusterRows,
    num_clusters: int,
    num_nearest: int,
    scan: torch.dtype,
    centroids_CD: torch.Tensor,
    subspace: Subspace | None,
) -> tuple[float, float, float]:
    """Time a block of rows against some of them as centroids.

    Returns:
        Seconds of an iteration in full, of one in few directions (0 where there are none), and of the assignment.
    """
    centroids_CD = centroids_CD.to(machine.device)
    block = rows.features(0, min(len(rows), _SAMPLE))
    subspace = None if subspace is None else subspace.to(machine.device)

    def over_all(seconds: float) -> float:
        """Scale the time of a comparison to all rows and all centroids."""
        return seconds * num_clusters / len(centroids_CD) * len(rows) / len(block) / machine.size

    def pass_over_all(load: Callable[[], Loaded], look: Callable[[Loaded], object]) -> float:
        prepare, loaded = time_trial(load, machine.device, at_least=_SHORTEST)
        compare = time_trial(lambda: look(loaded), machine.device, at_least=_SHORTEST).seconds
        return prepare * len(rows) / len(block) / machine.size + over_all(compare)

    def read() -> torch.Tensor:
        return torch.from_numpy(np.array(block)).to(machine.device)

    in_subspace = 0.0
    if subspace is not None:
        directions, codes_Cd = subspace, code_centroids(subspace.project(centroids_CD))
        in_subspace = pass_over_all(
            lambda: CodedRows.of(directions.project(read())).codes_Bd,
            lambda codes: nearest_codes(codes, codes_Cd, scan),
        )
    search = NearestCentroids(centroids_CD, scan)
    in_full = pass_over_all(lambda: prepare_rows(read(), scan), search.nearest)
    rows_BD = read()
    num_nearest = min(num_nearest, len(centroids_CD))
    sides = 2 if rows.embeddings.has_texts else 1
    look_up = time_trial(lambda: top_nearest(rows_BD, centroids_CD, num_nearest), machine.device, at_least=_SHORTEST)
    return in_full, in_subspace, sides * over_all(look_up.seconds)
