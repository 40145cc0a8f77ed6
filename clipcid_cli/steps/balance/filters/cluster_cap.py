"""``--max-per-cluster``: at most so many images of each cluster stay after repeats were dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.algorithms.near.exact import DoubleArray, IntArray
from clipcid_cli.algorithms.sets.representatives import best_of_groups, random_scores
from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.fingerprint import record, refuse_changed
from clipcid_cli.formats.join import join, parquet_listing
from clipcid_cli.formats.results.clusters import TABLE, read_labels
from clipcid_cli.formats.sidecar import ClusterSidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory, remake_clusters
from clipcid_cli.steps.balance.context import Context
from clipcid_cli.steps.balance.rows import caption_similarities
from clipcid_cli.steps.balance.samples import count_pixels
from clipcid_cli.steps.balance.sets import Sets
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.balance import BalanceSettings
from clipcid_cli.steps.shared_arrays import share_arrays


@dataclasses.dataclass(frozen=True)
class ClusterCap:
    """Which of the images that repeats have left are dropped because their cluster has more than it may.

    Attributes:
        most: Images that stay of each cluster at most.
        cluster: Cluster of each finite row, int32 [N]; −1 where it is in none.
        dropped: Which rows are dropped, bool [N].
        before: Images of each cluster before, int64 [K].
        after: And after, int64 [K].
    """

    most: int
    cluster: npt.NDArray[np.int32]
    dropped: npt.NDArray[np.bool_]
    before: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]

    def summarise(self) -> dict[str, Any]:
        """Return what the JSON object says."""
        return {
            "most": self.most,
            "clusters": int(np.count_nonzero(self.before)),
            "capped": int(np.count_nonzero(self.before > self.most)),
            "dropped": int(self.before.sum() - self.after.sum()),
            "largest": int(self.before.max(initial=0)),
        }


@dataclasses.dataclass(frozen=True)
class FoundClusters:
    """The clusters of ``--max-per-cluster``.

    Attributes:
        folder: Their folder.
        identity: Hash of their table.
        images: Number of images in them.
        skipped: Number of images that were left out when they were made, since their rows are not usable.
    """

    folder: Path
    identity: str
    images: int
    skipped: int

    def warn_of_few(self, settings: BalanceSettings, num_rows: int, reporter: Reporter) -> None:
        """Warn, before the search, where they are of fewer images than the rows to balance.

        Args:
            num_rows: Number of those.
        """
        if self.images + self.skipped < num_rows:
            reporter.warn(
                f"The clusters in {self.folder} are of {self.images:,} images, and {num_rows:,} are balanced: where one "
                f"that is kept is in none of them, the run ends with an error. To cluster all images: "
                f"{_cluster_all(settings, overwrite=True)}"
            )


def find_clusters(settings: BalanceSettings, reporter: Reporter) -> FoundClusters | None:
    """Find the clusters of ``--max-per-cluster``, and say which they are; None without it."""
    if settings.max_per_cluster is None:
        return None
    folder = settings.clusters
    if folder is None:
        folder = WorkDirectory(settings.work).find_clusters(**_flags_for_all(settings))
    path = sidecar_path(folder, "cluster")
    sidecar = read_sidecar(path, ClusterSidecar)
    if sidecar is None or not (folder / TABLE).exists():
        raise ClipcidError(
            f"{folder} holds no finished clusters.",
            f"Give --clusters DIR, or run: {_cluster_all(settings)}",
        )
    fix = remake_clusters(folder, sidecar, settings.work)
    refuse_changed(folder, [each for each in sidecar.outputs if each.path == TABLE], path, fix)
    images = sidecar.result["images"]
    reporter.note(f"Clusters: {folder}, of {images:,} images.")
    return FoundClusters(folder, record(folder / TABLE).hash, images, sum(sidecar.counts["skipped"].values()))


def _flags_for_all(settings: BalanceSettings) -> dict[str, Any]:
    """Return the flags by which all images are clustered: a later keep list may keep others than the one that is there."""
    keys = None if settings.keys == "sample" else settings.keys
    return {
        "embeddings": settings.embeddings,
        "npz_array": settings.npz_array,
        "keys": keys,
        "keep_list": "none",
    }


def _cluster_all(settings: BalanceSettings, **more: Any) -> str:
    return command_line("cluster", **_flags_for_all(settings), work=settings.work, **more)


def cap_clusters(context: Context, clusters: FoundClusters, sets: Sets) -> ClusterCap:
    """Choose which images stay; the same on every process.

    Args:
        sets: The sets, whose kept images are counted.
    """
    most = context.settings.max_per_cluster
    assert most is not None  # the clusters were found

    def cap() -> Arrays:
        everything, rows = context.filters.everything, context.rows
        cluster, similarity = _look_up(context, clusters.folder / TABLE)
        kept = np.flatnonzero(sets.kept)
        place = kept if rows.positions is None else rows.positions[kept]
        labels = cluster[place]
        if num_missing := int(np.count_nonzero(labels < 0)):
            again = _cluster_all(context.settings, overwrite=True)
            raise ClipcidError(
                f"{num_missing:,} of the {len(kept):,} images that are kept are in none of the clusters in "
                f"{clusters.folder}, which were made from other images.",
                f"Name other clusters with --clusters, or cluster all images: {again}",
            )
        before = np.bincount(labels, minlength=int(cluster.max(initial=-1)) + 1)
        crowded = before[labels] > most
        score = _SCORES[context.settings.select](context, kept[crowded], similarity[place[crowded]])
        stays = best_of_groups(score, labels[crowded], most)
        dropped = np.zeros(len(everything), np.bool_)
        dropped[place[crowded][~stays]] = True
        return cluster, dropped, before, np.minimum(before, most)

    return ClusterCap(most, *share_arrays(context.machine, context.output.work, cap))


def _look_up(context: Context, table: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the cluster of each finite row and its similarity to the centroid, [N] each; −1 and 0 where it is in none."""
    everything, embeddings = context.filters.everything, context.embeddings

    def keys() -> Iterator[pa.ChunkedArray]:
        parts = everything.pick((file, embeddings.keys_of(file)) for file in embeddings.files)
        return (pa.chunked_array([part]) for part in parts)

    place = join(keys, len(everything), parquet_listing(table), context.settings.work)[:, 0]
    labels, similarities = read_labels(table)
    is_there = place >= 0
    cluster, similarity = np.full(len(place), -1, np.int32), np.zeros(len(place), np.float32)
    cluster[is_there], similarity[is_there] = labels[place[is_there]], similarities[place[is_there]]
    return cluster, similarity


def _nearest(context: Context, rows: IntArray, similarity: npt.NDArray[np.float32]) -> DoubleArray:
    return similarity.astype(np.float64)


def _first(context: Context, rows: IntArray, similarity: npt.NDArray[np.float32]) -> DoubleArray:
    return np.zeros(len(rows))


def _random(context: Context, rows: IntArray, similarity: npt.NDArray[np.float32]) -> DoubleArray:
    return random_scores(rows, context.settings.seed)


def _caption(context: Context, rows: IntArray, similarity: npt.NDArray[np.float32]) -> DoubleArray:
    return caption_similarities(context.embeddings, context.rows, rows, context.reporter)


def _resolution(context: Context, rows: IntArray, similarity: npt.NDArray[np.float32]) -> DoubleArray:
    assert context.data is not None  # it was opened before the search
    return count_pixels(context.data, context.embeddings, context.rows.numbers[rows], context.reporter)


# Each rule of ``--select`` that can choose several images of a cluster: scores of rows, given their centroids' similarities.
_SCORES = {
    "central": _nearest,
    "first": _first,
    "random": _random,
    "similarity": _caption,
    "resolution": _resolution,
}
