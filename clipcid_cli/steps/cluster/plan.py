"""What `cluster` will do, once everything that can be wrong has been looked at."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clipcid_cli.algorithms.kmeans.kmeans import default_num_clusters
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.output import find_output, is_claimed
from clipcid_cli.formats.sidecar import ClusterSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps.cluster.rows import ClusterRows, choose_rows
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.cluster import ClusterSettings

# As many as faiss asks for before it warns.
_MIN_PER_CENTROID = 39


@dataclasses.dataclass(frozen=True)
class ClusterPlan:
    """What is clustered, and into how many clusters.

    Attributes:
        folder: Where the clusters are to lie.
        trained: The rows that centroids are computed from: all, or some drawn ones (--train-rows).
        wanted: Arguments of `claim_output`.
    """

    settings: ClusterSettings
    folder: Path
    rows: ClusterRows
    trained: ClusterRows
    num_clusters: int
    wanted: dict[str, Any]


def make_plan(settings: ClusterSettings, reporter: Reporter) -> ClusterPlan:
    """Look at everything that can be wrong, and say what was taken."""
    folder, rows = WorkDirectory(settings.work).clusters, choose_rows(settings, reporter)
    num_clusters = _choose_num_clusters(settings, rows, reporter)
    trained = rows
    if settings.train_rows is not None and settings.train_rows < len(rows):
        trained = rows.sample(settings.train_rows, settings.seed)
        if len(trained) < _MIN_PER_CENTROID * num_clusters and not settings.dry_run:
            reporter.warn(
                f"--train-rows {len(trained):,} gives each of {num_clusters:,} centroids "
                f"{len(trained) / num_clusters:.1f} images, too few to represent the others. Use at least "
                f"{_MIN_PER_CENTROID * num_clusters:,} ({_MIN_PER_CENTROID} a centroid)."
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
    return ClusterPlan(settings, folder, rows, trained, num_clusters, wanted)


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
