"""`cluster`: kept embeddings → centroids by k-means → the nearest centroids of every image and caption."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipcid_cli.algorithms.kmeans.kmeans import default_num_clusters
from clipcid_cli.algorithms.kmeans.lloyd import LloydState
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_npy
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output, find_output, is_claimed
from clipcid_cli.formats.results.clusters import CENTROIDS, PROGRESS, TABLE, join_parts, part_bounds, top_paths
from clipcid_cli.formats.sidecar import ClusterSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.cluster.assign import assign_clusters, search_width, summarise, towers_of
from clipcid_cli.steps.cluster.cost import estimate_cost
from clipcid_cli.steps.cluster.rows import ClusterRows, find_rows
from clipcid_cli.steps.cluster.train import train_centroids
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.cluster import ClusterSettings
from clipcid_cli.steps.settings.shared import given_flags

# As many as faiss asks for before it warns.
_FEWEST_A_CENTROID = 39


@dataclasses.dataclass(frozen=True)
class ClusterPlan:
    """What is clustered, and into how many clusters.

    Attributes:
        trained: The rows that centroids are computed from: all, or some drawn ones (--train-rows).
        wanted: Arguments of `claim_output`.
    """

    rows: ClusterRows
    trained: ClusterRows
    num_clusters: int
    wanted: dict[str, Any]


def run(settings: ClusterSettings, reporter: Reporter) -> dict[str, Any]:
    """Cluster embeddings.

    Returns:
        The JSON object: ``images, clusters, objective, iterations, empty_clusters, largest_cluster, skipped{}, seconds{read,
        kmeans, assign, write}, files{}``. ``objective`` is the images' mean similarity to their own centroid.
    """
    folder, seconds = WorkDirectory(settings.work).clusters, dict[str, float]()
    with open_machine(settings.device) as machine:
        with _timed(seconds, "read"):
            plan = machine.on_main(lambda: _plan(settings, folder, reporter))
        if settings.dry_run:
            return estimate_cost(settings, machine, plan.rows, plan.trained, plan.num_clusters, reporter)
        with claim_output(machine, folder, "cluster", ClusterSidecar, **plan.wanted) as output:
            if output.finished is not None:
                reporter.note(f"These clusters are in {folder} already.")
                result = output.finished.result
            else:
                machine.on_main(output.start)
                with _timed(seconds, "kmeans"):
                    state = train_centroids(
                        settings, plan.trained, plan.num_clusters, machine, output.work / PROGRESS, reporter
                    )
                with _timed(seconds, "assign"):
                    assign_clusters(machine, plan.rows, state.centroids_KD, output.work, reporter)
                result = machine.on_main(lambda: _write(settings, plan, state, output, seconds, reporter))
        names = {"centroids": CENTROIDS, "clusters": TABLE, "sidecar": "cluster.json"}
        return result | {"files": {name: str(folder / file) for name, file in names.items()}}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def _plan(settings: ClusterSettings, folder: Path, reporter: Reporter) -> ClusterPlan:
    """Look at everything that can be wrong."""
    rows = find_rows(settings, reporter)
    num_clusters = _choose_num_clusters(settings, rows, reporter)
    trained = rows
    if settings.train_rows is not None and settings.train_rows < len(rows):
        trained = rows.sample(settings.train_rows, settings.seed)
        if len(trained) < _FEWEST_A_CENTROID * num_clusters and not settings.dry_run:
            reporter.warn(
                f"--train-rows {len(trained):,} gives each of {num_clusters:,} centroids "
                f"{len(trained) / num_clusters:.1f} images, too few to represent the others. Use at least "
                f"{_FEWEST_A_CENTROID * num_clusters:,} ({_FEWEST_A_CENTROID} a centroid)."
            )
    identity = {
        "features": settings.features,
        "num_clusters": num_clusters,
        "iterations": settings.iterations,
        "train_rows": None if trained is rows else settings.train_rows,
        "seed": settings.seed,
        "images": len(rows),
        # `embed` has made the keys of its own folders.
        "keys": settings.keys if rows.embeddings.sidecar is None else None,
    }
    wanted: dict[str, Any] = {"overwrite": settings.overwrite, "elsewhere": "--work, with --embeddings"}
    # Another tool's files are hashed for it, which a dry run does where there is something to compare them with.
    if not settings.dry_run or is_claimed(folder, "cluster"):
        wanted |= {"settings": identity, "inputs": rows.fingerprint()}
        if settings.dry_run:
            find_output(folder, "cluster", ClusterSidecar, **wanted)
    return ClusterPlan(rows, trained, num_clusters, wanted)


def _choose_num_clusters(settings: ClusterSettings, rows: ClusterRows, reporter: Reporter) -> int:
    count = len(rows) if settings.train_rows is None else min(settings.train_rows, len(rows))
    default = min(count, default_num_clusters(len(rows)))
    if settings.num_clusters is None:
        reporter.note(f"Clusters: {default:,}, the default for {len(rows):,} images (--num-clusters).")
        return default
    if settings.num_clusters > count:
        there = f"the {len(rows):,} images to cluster" if count == len(rows) else f"--train-rows {count:,}"
        raise ClipcidError(
            f"--num-clusters {settings.num_clusters:,} is more than {there}.",
            f"Give --num-clusters at most {count:,}; the default would be {default:,}.",
        )
    return settings.num_clusters


def _write(
    settings: ClusterSettings,
    plan: ClusterPlan,
    state: LloydState,
    output: Output[ClusterSidecar],
    seconds: dict[str, float],
    reporter: Reporter,
) -> dict[str, Any]:
    """Write centroids and table, and finish the output; return its result."""
    rows, num_clusters = plan.rows, plan.num_clusters
    with _timed(seconds, "write"):
        write_npy(output.work / CENTROIDS, state.centroids_KD.numpy())
        join_parts(output.work, part_bounds(len(rows)), rows.keys)
        result, temperatures = summarise(rows, num_clusters, output.work)
    result |= {
        "iterations": state.iterations,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    if result["empty_clusters"]:
        reporter.warn(
            f"{result['empty_clusters']:,} of {num_clusters:,} clusters are empty: the data has hardly more "
            "different images than clusters, or fewer. Use a smaller --num-clusters."
        )
    arrays = [path.name for tower in towers_of(rows) for path in top_paths(output.work, tower)]
    output.commit(
        counts={"read": rows.embeddings.num_rows, "used": len(rows), "skipped": rows.skips.counts},
        seconds=seconds,
        outputs=[record(output.work / name, output.work) for name in (CENTROIDS, TABLE, *arrays)],
        embeddings=WorkDirectory(settings.work).name_of(rows.embeddings.folder),
        keep_list=None if rows.keep_list is None else record(rows.keep_list),
        flags=given_flags(settings),
        model=None if rows.embeddings.sidecar is None else rows.embeddings.sidecar.model,
        num_nearest=search_width(num_clusters),
        temperatures=temperatures,
        result=result,
    )
    return result
