"""``--max-per-cluster``: at most so many images of each cluster stay after repeats were dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.algorithms.near.exact import BoolArray, DoubleArray, FloatArray, IntArray
from clipcid_cli.algorithms.sets.representatives import best_of_groups
from clipcid_cli.errors import ClipcidError, command_line, flag_words
from clipcid_cli.formats.arrays import Arrays
from clipcid_cli.formats.embeddings.folder import KEY_COLUMN
from clipcid_cli.formats.fingerprint import record, validate_unchanged
from clipcid_cli.formats.join import join, parquet_listing
from clipcid_cli.formats.parquet import read_columns
from clipcid_cli.formats.results.clusters import ClusterSidecar
from clipcid_cli.formats.results.keep_list import Column
from clipcid_cli.formats.sidecar import read_sidecar, run_again, sidecar_path
from clipcid_cli.formats.work_directory import CLUSTERS, WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.balance.balance_run import BalanceRun
from clipcid_cli.steps.balance.curves import count_sizes
from clipcid_cli.steps.balance.filters.filter import Dropped, Filter, FilterCost
from clipcid_cli.steps.balance.filters.reference import Reference
from clipcid_cli.steps.balance.pictures import ReportPictures
from clipcid_cli.steps.balance.plan import BalanceInputs
from clipcid_cli.steps.balance.result import ClusterCapResult
from clipcid_cli.steps.balance.scores import SCORES
from clipcid_cli.steps.settings.balance import BalanceSettings

# Rows that are read together.
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class ClusterCap(Dropped):
    """Which of the images that repeats have left are dropped because their cluster has more than it may."""

    name: ClassVar = "cluster_cap"
    reason: ClassVar = "cluster"
    words: ClassVar = "in clusters with too many images"
    most: int  # images that stay of each cluster at most
    cluster: npt.NDArray[np.int32]  # cluster of each row, int32 [N]; −1 where it is in none
    before: npt.NDArray[np.int64]  # images of each cluster before, int64 [K]

    def summarise(self) -> ClusterCapResult:
        return ClusterCapResult(
            most=self.most,
            clusters=int(np.count_nonzero(self.before)),
            capped=int(np.count_nonzero(self.before > self.most)),
            dropped=int(np.count_nonzero(self.is_dropped)),
            largest=int(self.before.max(initial=0)),
        )

    def columns(self, folder: Path) -> list[Column]:
        def read(part: slice) -> pa.Array:
            return pa.array(self.cluster[part], pa.int32(), mask=self.cluster[part] < 0)

        return [Column("cluster", pa.int32(), read)]

    def show(self, run: BalanceRun, pictures: ReportPictures) -> list[dict[str, Any]]:
        return count_sizes(self.before, after=np.minimum(self.before, self.most))


@dataclasses.dataclass(frozen=True)
class MaxPerCluster(Filter):
    """Drops images of crowded clusters; the hash of the clusters' table, and how many images are in them."""

    follows_search: ClassVar = True
    folder: Path
    hash: str
    images: int
    skipped: int  # how many are in none, since their rows are not usable
    of_repaired: bool  # whether they were made of repaired rows, which `balance` does not read

    def identify(self, references: Sequence[Reference]) -> dict[str, Any]:
        return {"clusters": self.hash}

    def estimate(self, inputs: BalanceInputs, sample: IntArray, searched: int) -> FilterCost:
        note = f"After it, clusters are capped: {self.folder}, {self.images:,} images."
        # The cluster of each image is written as an int32.
        return FilterCost({"clustered_images": self.images}, searched, bytes_an_image=4, note=note)

    def find_risk(self, searched: int) -> str:
        if self.images + self.skipped >= searched:
            return ""
        return (
            f"The clusters in {self.folder} are of {self.images:,} images, and {searched:,} are balanced: if a kept "
            f"image is in no cluster, the run ends with an error. To cluster all images: "
            f"{_cluster_all_again(self.settings)}"
        )

    def apply(self, run: BalanceRun, is_left: BoolArray) -> ClusterCap:
        most = self.settings.max_per_cluster
        assert most is not None  # it was asked for

        def cap() -> Arrays:
            cluster, similarity = _look_up(run, self.folder / CLUSTERS)
            kept = np.flatnonzero(is_left)
            labels = cluster[kept]
            if num_missing := int(np.count_nonzero(labels < 0)):
                raise ClipcidError(
                    f"{num_missing:,} of the {len(kept):,} images that are kept are in none of the clusters in "
                    f"{self.folder}, which were made from other images.",
                    f"Name other clusters with --clusters, or cluster all images: {_cluster_all_again(self.settings)}",
                )
            before = np.bincount(labels, minlength=int(cluster.max(initial=-1)) + 1)
            crowded = kept[before[labels] > most]
            scores: FloatArray | DoubleArray
            if self.settings.select != "central":
                scores = SCORES[self.settings.select](run, crowded)
            elif self.of_repaired:
                scores = _similarity_to_means(run, cluster, crowded)
            else:
                scores = similarity[crowded]
            stays = best_of_groups(scores.astype(np.float64), cluster[crowded], most)
            is_dropped = np.zeros(len(is_left), np.bool_)
            is_dropped[crowded[~stays]] = True
            return is_dropped, cluster, before

        is_dropped, cluster, before = run.shared.publish(cap)
        return ClusterCap(is_dropped, most, cluster, before)


def find_clusters(settings: BalanceSettings) -> MaxPerCluster:
    """Find the clusters of ``--max-per-cluster``, and say which they are."""
    folder = settings.clusters or WorkDirectory(settings.work).find_clusters(**_flags_for_all(settings))
    path = sidecar_path(folder, "cluster")
    sidecar = read_sidecar(path, ClusterSidecar)
    if sidecar is None or not (folder / CLUSTERS).exists():
        raise ClipcidError(
            f"{folder} holds no finished clusters.",
            f"Give --clusters DIR, or run: {_cluster_all(settings)}",
        )
    fix = run_again("cluster", sidecar)
    validate_unchanged(folder, [file for file in sidecar.outputs if file.path == CLUSTERS], path, fix)
    images = sidecar.result["images"]
    reporting.note(f"Clusters: {folder}, of {images:,} images.")
    of_repaired = sidecar.repair is not None
    if of_repaired:
        reporting.note(
            "They were made of repaired rows; which images stay is decided by the stored rows. To cluster these: "
            f"{_cluster_all_again(settings)}"
        )
    skipped = sum(sidecar.counts["skipped"].values())
    return MaxPerCluster(settings, folder, record(folder / CLUSTERS).hash, images, skipped, of_repaired)


def _flags_for_all(settings: BalanceSettings) -> dict[str, Any]:
    """Return the flags by which all images are clustered: a later keep list may keep others than the one that is there."""
    keys = None if settings.keys == "sample" else settings.keys
    key_column = None if settings.key_column == KEY_COLUMN else settings.key_column
    return {
        "embeddings": settings.embeddings,
        "npz_array": settings.npz_array,
        "embedding_column": settings.embedding_column,
        "keys": keys,
        "key_column": key_column,
        "keep_list": "none",
        "repair": "none",  # images are compared by the rows as they are stored
    }


def _cluster_all(settings: BalanceSettings, **more: Any) -> str:
    return command_line("cluster", **_flags_for_all(settings), work=settings.work, **more)


def _cluster_all_again(settings: BalanceSettings) -> str:
    """Give the command for clusters of all images; of embeddings that were named it replaces none of other ones."""
    if settings.embeddings is None:
        return _cluster_all(settings, overwrite=True)
    cluster = command_line("cluster", **_flags_for_all(settings), work="OTHER")
    return f"{cluster}\nThen name them: {flag_words(clusters='OTHER/clusters')}"


def _look_up(run: BalanceRun, table: Path) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Return the cluster of each row and its similarity to the centroid, [N] each; −1 and 0 where it is in none."""

    def keys() -> Iterator[pa.ChunkedArray]:
        pieces = run.embeddings.take_column(run.embeddings.keys_of, run.rows.numbers)
        return (pa.chunked_array([piece]) for piece in pieces)

    place = join(keys, len(run.rows), parquet_listing(table), run.settings.work)[:, 0]
    fix = "Run their command again with --overwrite."
    columns = read_columns(table, {"cluster": pa.int32(), "similarity": pa.float32()}, fix)
    labels, similarities = columns["cluster"].to_numpy(), columns["similarity"].to_numpy()
    is_there = place >= 0
    return np.where(is_there, labels[place], np.int32(-1)), np.where(is_there, similarities[place], np.float32(0.0))


def _similarity_to_means(run: BalanceRun, cluster: npt.NDArray[np.int32], rows: IntArray) -> DoubleArray:
    """Return the cosine similarity of some rows to the mean of the stored rows of their clusters, float64 [n]."""
    sums = np.zeros((int(cluster.max(initial=-1)) + 1, run.embeddings.width))
    for start in range(0, len(cluster), _ROWS_AT_ONCE):
        block = np.arange(start, min(start + _ROWS_AT_ONCE, len(cluster)))
        block = block[cluster[block] >= 0]
        np.add.at(sums, cluster[block], run.rows.read(block).astype(np.float64))
    means = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    similarity = np.empty(len(rows))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[start : start + _ROWS_AT_ONCE]
        similarity[start : start + len(some)] = (run.rows.read(some).astype(np.float64) * means[cluster[some]]).sum(
            axis=1
        )
    return similarity
