"""The clusters of a run: found, checked against teacher and data, and made into the targets of each batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.algorithms.losses.cluster import ProjectedCentroids, draw_candidates, mean_centroids, soft_labels
from clipcid_cli.algorithms.losses.shared_space import PrincipalAxes
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.clusters import CENTROIDS, Clusters, TopClusters, open_clusters, read_cluster_sidecar
from clipcid_cli.formats.results.matched_samples import Column
from clipcid_cli.formats.sidecar import run_again
from clipcid_cli.formats.work_directory import CLUSTERS, WorkDirectory
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.samples import MatchCounts
from clipcid_cli.steps.distill.stored import flags_of_embeddings
from clipcid_cli.steps.distill.teachers import Teacher
from clipcid_cli.steps.models import cluster_with, validate_teacher
from clipcid_cli.steps.settings.distill import DistillSettings


@dataclasses.dataclass(frozen=True)
class ChosenClusters:
    """The clusters that teach, with τ_T of the images' and of the captions' distribution: as requested, else as stored."""

    files: Clusters
    teach_text: bool
    temperatures: tuple[float, float]

    @property
    def towers(self) -> list[tuple[TopClusters, float]]:
        """The nearest centroids of the table's rows and τ_T, of each tower that is taught."""
        captions = self.files.captions
        taught = [self.files.images] if captions is None or not self.teach_text else [self.files.images, captions]
        return list(zip(taught, self.temperatures, strict=False))

    def fingerprints(self) -> list[FileRecord]:
        """Describe the files that a run reads of them."""
        return [record(self.files.folder / name) for name in (CLUSTERS, CENTROIDS)]

    def open(
        self,
        settings: DistillSettings,
        teacher: Teacher,
        axes: PrincipalAxes | None,
        table_rows: Column,
        device: torch.device,
    ) -> ClusterLookup:
        """Make them ready for training, in the space of the teacher's principal `axes` where it is cut to them."""
        if teacher.online is not None and teacher.width is not None:
            fix = cluster_with(teacher.online, settings)
            validate_width(self.files, f"teacher {teacher.online.spec}", teacher.width, fix)
        centroids = ProjectedCentroids(self.files.centroids, axes, device)
        return ClusterLookup(centroids, table_rows, self.towers, settings)


def validate_named_clusters(settings: DistillSettings) -> None:
    """Refuse clusters that are not there, or unfinished, before anything else is looked at."""
    work = WorkDirectory(settings.work)
    read_cluster_sidecar(settings.clusters or work.find_clusters(**flags_of_embeddings(settings)))


def find_clusters(
    settings: DistillSettings, embeddings: Embeddings | None, online: ModelName | None, keep_list: Path | None
) -> Clusters:
    """Open the clusters; those of another teacher or of an earlier keep list are refused."""
    folder = settings.clusters or WorkDirectory(settings.work).find_clusters()
    clusters = open_clusters(folder)
    model = clusters.sidecar.model
    if model is not None and online is not None:
        validate_teacher(f"clusters in {folder}", model, online, cluster_with(online, settings))
    again = _cluster_again(clusters, embeddings)
    if embeddings is not None:
        embedded = embeddings.model
        if model is not None and embedded is not None and model.weights_hash != embedded.weights_hash:
            raise ClipcidError(
                f"The clusters in {folder} are of {model.spec}, the embeddings of {embedded.spec}.", again
            )
        validate_width(clusters, "embeddings", embeddings.width, again)
    if settings.cluster_towers == "both" and clusters.captions is None:
        raise ClipcidError(
            f"--cluster-towers both, but the clusters in {folder} were made without captions.",
            f"Use clusters of embeddings with captions. {again}",
        )
    made_from = clusters.sidecar.keep_list  # clusters made without one fit any
    if keep_list is not None and made_from is not None and made_from.hash != record(keep_list).hash:
        raise ClipcidError(
            f"The clusters in {folder} were made from another keep list than {keep_list} holds now.",
            _cluster_again(clusters, None, keep_list=keep_list),
        )
    return clusters


def choose_clusters(
    settings: DistillSettings, clusters: Clusters, teacher: Teacher, counts: MatchCounts, *, several_captions: bool
) -> ChosenClusters:
    """Let clusters teach; those of other images, or of the teacher before its repair, are refused.

    Args:
        several_captions: Whether a sample may show another caption than its first.
    """
    embeddings = teacher.embeddings
    if teacher.judgement.is_decided:
        _validate_repair(settings, clusters, embeddings)
    if counts.without_cluster:
        few = counts.without_cluster
        lacking = f"{few:,} of {counts.candidates:,} samples to train on are not in {clusters.folder}"
        # With stored embeddings, what `embed` left out is known; beside an online teacher the clusters alone tell.
        if not settings.online_teacher or few > settings.max_bad_fraction * counts.candidates:
            or_not = ", or these could not be embedded (--max-bad-fraction)" if settings.online_teacher else ""
            raise ClipcidError(
                f"{lacking}: the clusters were made from another keep list, or before data was added{or_not}.",
                _cluster_again(clusters, embeddings, keep_list=settings.keep_list),
            )
        reporting.warn(f"{lacking}: they are left out.")
    teach_text = settings.cluster_towers == "both"
    if settings.cluster_towers == "auto":
        # Where it can: in recipes/ablation, on drawings that the teacher knew, retrieval was 4.1 (R@1) and 6.2 points
        # (R@10) worse with the image tower alone (95 %: 1.8…6.2 and 4.4…8.2), hardly better than without the loss. It
        # cannot where a sample may show another caption than its first, the only one whose clusters are known.
        teach_text = clusters.captions is not None and settings.trains_text and not several_captions
    elif teach_text and several_captions:
        reporting.warn("--cluster-towers both: captions after an image's first are taught the clusters of the first.")
    towers = "both towers" if teach_text else "the image tower"
    reporting.note(f"Clusters: {clusters.folder}, {len(clusters.centroids):,} centroids, for {towers}.")
    stored = clusters.sidecar.temperatures
    image = settings.cluster_temperature or stored["image"]
    caption = settings.cluster_temperature or stored.get("caption", image)
    return ChosenClusters(clusters, teach_text, (image, caption))


def validate_width(clusters: Clusters, teaching: str, width: int, fix: str) -> None:
    """Refuse clusters of another width than what teaches."""
    own = clusters.centroids.shape[1]
    if own != width:
        raise ClipcidError(
            f"The clusters in {clusters.folder} have width {own}, the {teaching} {width}: they are of another teacher.",
            fix,
        )


def _cluster_again(clusters: Clusters, embeddings: Embeddings | None, **more: Any) -> str:
    named = {} if embeddings is None else embeddings.flags
    return run_again("cluster", clusters.sidecar, **named, **more)


def _validate_repair(settings: DistillSettings, clusters: Clusters, embeddings: Embeddings | None) -> None:
    """Refuse clusters of image rows that were repaired where the teacher's are not, or differently."""
    image_map = None if embeddings is None else embeddings.image_map
    clustered = clusters.sidecar.repair
    used = None if image_map is None else image_map.record
    if (None if clustered is None else clustered.content) == (None if used is None else used.content):
        return
    of = "the teacher as it is" if clustered is None else "a repaired teacher"
    now = "as it is" if used is None else "repaired" if clustered is None else "repaired otherwise"
    raise ClipcidError(
        f"The clusters in {clusters.folder} are of {of}, and this run has its teacher {now}.",
        _cluster_again(clusters, embeddings, repair=settings.repair),
    )


@dataclasses.dataclass(frozen=True)
class ClusterLookup:
    """The cluster targets of any batch; `table_rows` are of each sample to train on, mapped."""

    centroids: ProjectedCentroids
    table_rows: Column
    towers: list[tuple[TopClusters, float]]
    settings: DistillSettings

    def targets(
        self, rows: npt.NDArray[np.int64], step: int, own: slice = slice(None)
    ) -> tuple[ClusterTargets, ClusterTargets | None]:
        """Return the targets of a global batch: of its images, and of its captions where both towers are taught.

        They are those of the images, whatever view is shown, and of first captions; the step decides the draw of centroids.

        Args:
            rows: The batch's samples among those to train on, int64 [B].
            own: This process's samples: with local losses it needs the mean centroids of these alone.
        """
        settings = self.settings
        total = len(self.centroids)
        table_rows = self.table_rows[rows].astype(np.int64)
        own_rows = table_rows[own] if settings.local_loss else table_rows
        stored = np.concatenate([top.clusters[table_rows] for top, _ in self.towers])
        if stored.min() < 0 or stored.max() >= total:
            raise ClipcidError(
                f"The clusters' arrays name clusters {stored.min()} to {stored.max()}; there are {total:,} centroids.",
                "Run their command again with --overwrite.",
            )
        seed = derive_seed("candidates", settings.seed, step)
        candidates = draw_candidates(
            stored,
            total,
            ratio=settings.candidate_ratio,
            minimum=settings.min_candidates,
            seed=seed,
            corrected=settings.candidate_correction,
        )
        centroids_SD = self.centroids.take(candidates.ids)
        log_correction_S = torch.from_numpy(candidates.log_correction_S).to(centroids_SD.device)
        labels = [
            soft_labels(top.similarities[own_rows], temperature=temperature, label_share=settings.label_share)
            for top, temperature in self.towers
        ]
        own_stored = np.concatenate([top.clusters[own_rows] for top, _ in self.towers])
        means_bD = torch.split(mean_centroids(self.centroids, own_stored, torch.cat(labels)), len(own_rows))
        image, *caption = [ClusterTargets(centroids_SD, log_correction_S, mean_bD) for mean_bD in means_bD]
        return image, caption[0] if caption else None
