"""The JSON objects of `cluster`."""

from __future__ import annotations

import msgspec

from clipcid_cli.formats.sidecar import RepairFigures


class ClusterResult(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The clusters made."""

    images: int
    clusters: int
    objective: float  # mean similarity of the images to their own centroid
    empty_clusters: int
    largest_cluster: int
    skipped: dict[str, int]  # rows by reason
    iterations: int
    repair: RepairFigures | None = None  # that of the teacher, where it was repaired
    seconds: dict[str, float]  # ``read, kmeans, assign, write``
    files: dict[str, str] = {}  # the path of each file by its name; the sidecar holds the result without them


class ClusterCost(msgspec.Struct):
    """What a run would take."""

    images: int
    clusters: int
    flop: int  # that of products of all rows (of ``--train-rows``) with all centroids in each iteration
    # Of a process above the mapped files, most of it a float32 and a low-precision copy of the centroids and their
    # float64 sums.
    memory_bytes: int
    # ``kmeans_least, kmeans_most, assign``: of one iteration, after which fewer and fewer rows are compared; of all
    # rows in each iteration; of the assignment.
    seconds: dict[str, float]
