"""The JSON objects of `cluster`."""

from __future__ import annotations

import msgspec

from clipcid_cli.formats.sidecar import RepairFigures


class ClusterResult(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The clusters made.

    Attributes:
        objective: Mean similarity of the images to their own centroid.
        skipped: Rows by reason.
        repair: That of the teacher, where it was repaired.
        seconds: ``read, kmeans, assign, write``.
        files: The path of each file by its name; the sidecar holds the result without them.
    """

    images: int
    clusters: int
    objective: float
    empty_clusters: int
    largest_cluster: int
    skipped: dict[str, int]
    iterations: int
    repair: RepairFigures | None = None
    seconds: dict[str, float]
    files: dict[str, str] = {}


class ClusterCost(msgspec.Struct):
    """What a run would take.

    Attributes:
        flop: That of products of all rows (of ``--train-rows``) with all centroids in each iteration.
        memory_bytes: Of a process above the mapped files, most of it a float32 and a low-precision copy of the centroids
            and their float64 sums.
        seconds: ``kmeans_least, kmeans_most, assign``: of one iteration, after which fewer and fewer rows are compared; of
            all rows in each iteration; of the assignment.
    """

    images: int
    clusters: int
    flop: int
    memory_bytes: int
    seconds: dict[str, float]
