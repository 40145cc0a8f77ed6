"""The clusters of a run: found, checked against teacher and data, and made into the targets of each batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.algorithms.losses.centroids import ProjectedCentroids
from clipcid_cli.algorithms.losses.cluster import ClusterCandidates, cluster_targets, draw_candidates
from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.algorithms.losses.shared_space import PrincipalAxes
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.results.clusters import Clusters, TopClusters, open_clusters
from clipcid_cli.formats.results.matched_samples import Column
from clipcid_cli.formats.work_directory import WorkDirectory, remake_clusters
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps.distill.samples import MatchCounts
from clipcid_cli.steps.distill.teacher_inputs import TeacherInputs
from clipcid_cli.steps.model_identity import cluster_with, find_mismatch
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

# Centroids that take at most this many bytes in the shared space are kept there: K = 32,768 at 512 dimensions.
_KEPT_BYTES = 64 * 2**20


def find_clusters(
    settings: DistillSettings, embeddings: Embeddings | None, online: ModelName | None
) -> Clusters | None:
    """Open the clusters, where a loss asks for them.

    Args:
        online: The teacher that runs alongside the student; None where stored embeddings teach.
    """
    if not any(LOSSES[name].needs_clusters for name in settings.losses()):
        return None
    folder = settings.clusters or WorkDirectory(settings.work).find_clusters()
    clusters = open_clusters(folder, settings.work)
    model = clusters.sidecar.model
    if model is not None and online is not None and (difference := find_mismatch(model, online)) is not None:
        raise ClipcidError(
            f"The clusters in {clusters.folder} are of {model.spec}, {difference.what} {difference.recorded}; the "
            f"teacher is {online.spec}, {difference.what} {difference.named}.",
            cluster_with(online, settings),
        )
    if embeddings is not None:
        _check_clusters(settings, clusters, embeddings)
    if settings.cluster_towers == "both" and clusters.captions is None:
        raise ClipcidError(
            f"--cluster-towers both, but the clusters in {clusters.folder} were made without captions.",
            f"Use clusters of embeddings with captions. {_remake(settings, clusters, embeddings)}",
        )
    return clusters


def use_clusters(
    settings: DistillSettings,
    teacher_inputs: TeacherInputs,
    clusters: Clusters,
    counts: MatchCounts,
    reporter: Reporter,
) -> TeacherInputs:
    """Let clusters teach; those of other images are refused (ClipcidError: the fix remakes them)."""
    if counts.without_cluster:
        few, of = counts.without_cluster, counts.candidates
        lacking = f"{few:,} of {of:,} samples to train on are not in {clusters.folder}"
        # With stored embeddings, what `embed` left out is known; beside an online teacher the clusters alone tell.
        if not settings.online_teacher or few > settings.max_bad_fraction * of:
            or_not = ", or these could not be embedded (--max-bad-fraction)" if settings.online_teacher else ""
            raise ClipcidError(
                f"{lacking}: the clusters were made from another keep list{or_not}.",
                _remake(settings, clusters, teacher_inputs.embeddings, keep_list=settings.keep_list),
            )
        reporter.warn(f"{lacking}: they are left out.")
    several_captions = bool(counts.several_captions) and not teacher_inputs.first_captions
    if (text_clusters := _teaches_text(clusters, settings, several_captions)) and several_captions:
        reporter.warn("--cluster-towers both: captions after an image's first are taught the clusters of the first.")
    towers = "both towers" if text_clusters else "the image tower"
    reporter.note(f"Clusters: {clusters.folder}, {len(clusters.centroids):,} centroids, for {towers}.")
    return dataclasses.replace(teacher_inputs, clusters=clusters, text_clusters=text_clusters)


def _remake(settings: DistillSettings, clusters: Clusters, embeddings: Embeddings | None, **more: Any) -> str:
    named = {} if embeddings is None else {"embeddings": embeddings.folder}
    return remake_clusters(clusters.folder, clusters.sidecar, settings.work, **named, **more)


def _teaches_text(clusters: Clusters, settings: DistillSettings, several_captions: bool) -> bool:
    """Tell whether the cluster loss teaches the text tower as well.

    By default it does where it can: in recipes/ablation, on drawings that the teacher knew, retrieval was 4.1 (R@1) and 6.2
    points (R@10) worse with the image tower alone (95 %: 1.8…6.2 and 4.4…8.2), hardly better than without it. It cannot
    where a sample may show another caption than its first, the only one whose clusters are known (`several_captions`).
    """
    if settings.cluster_towers == "auto":
        return clusters.captions is not None and not settings.freeze_text and not several_captions
    return settings.cluster_towers == "both"


def _check_clusters(settings: DistillSettings, clusters: Clusters, embeddings: Embeddings) -> None:
    clustered, embedded = clusters.sidecar.model, None if embeddings.sidecar is None else embeddings.sidecar.model
    if clustered is not None and embedded is not None and clustered.weights_hash != embedded.weights_hash:
        raise ClipcidError(
            f"The clusters in {clusters.folder} are of {clustered.spec}, the embeddings of {embedded.spec}.",
            _remake(settings, clusters, embeddings),
        )
    if clusters.centroids.shape[1] != embeddings.width:
        raise ClipcidError(
            f"The clusters in {clusters.folder} have width {clusters.centroids.shape[1]}, the embeddings "
            f"{embeddings.width}: they are of another teacher.",
            _remake(settings, clusters, embeddings),
        )


def refuse_old_clusters(clusters: Clusters, keep_list: Path, work: Path) -> None:
    """Refuse clusters of an earlier keep list (ClipcidError: the fix remakes them); those made without one fit any."""
    made_from = clusters.sidecar.keep_list
    if made_from is not None and made_from.hash != record(keep_list).hash:
        raise ClipcidError(
            f"The clusters in {clusters.folder} were made from another keep list than {keep_list} holds now.",
            remake_clusters(clusters.folder, clusters.sidecar, work, keep_list=keep_list),
        )


@dataclasses.dataclass(frozen=True)
class ClusterLookup:
    """The cluster targets of any batch.

    Attributes:
        table_rows: Row of the clusters' table of each sample to train on, [N], mapped.
        images: The table's nearest centroids of the images.
        captions: The same of the captions; None where only the image tower is taught.
        image_temperature: τ_T of the images' distribution.
        ratio: Share r of all centroids drawn in addition to the batch's own.
        minimum: Smallest number of candidates.
        corrected: Whether a drawn centroid counts for all those it represents.
    """

    centroids: ProjectedCentroids
    table_rows: Column
    images: TopClusters
    captions: TopClusters | None
    image_temperature: float
    caption_temperature: float
    label_share: float
    ratio: float
    minimum: int
    corrected: bool
    seed: int

    def targets(self, rows: npt.NDArray[np.int64], step: int) -> tuple[ClusterTargets, ClusterTargets | None]:
        """Return the targets of a global batch: of its images, and of its captions where both towers are taught.

        Args:
            rows: Rows of its samples among those to train on, int64 [B].
            step: Number of the step; decides the draw of centroids.
        """
        table_rows = self.table_rows[rows].astype(np.int64)
        tops = [self.images] if self.captions is None else [self.images, self.captions]
        active = np.concatenate([top.clusters[table_rows].reshape(-1) for top in tops])
        if active.min() < 0 or active.max() >= len(self.centroids):
            raise ClipcidError(
                f"The clusters' arrays name clusters {active.min()} to {active.max()}; there are {len(self.centroids):,} "
                "centroids.",
                "Make the clusters again, by their command and --overwrite.",
            )
        candidates = draw_candidates(
            active,
            len(self.centroids),
            ratio=self.ratio,
            minimum=self.minimum,
            seed=derive_seed("candidates", self.seed, step),
        )
        if not self.corrected:
            candidates = dataclasses.replace(candidates, log_correction=0.0)
        centroids = self.centroids.take(candidates.ids)
        images = self._tower(candidates, centroids, self.images, table_rows, self.image_temperature)
        if self.captions is None:
            return images, None
        return images, self._tower(candidates, centroids, self.captions, table_rows, self.caption_temperature)

    def _tower(
        self,
        candidates: ClusterCandidates,
        centroids: Tensor,
        top: TopClusters,
        table_rows: npt.NDArray[np.int64],
        temperature: float,
    ) -> ClusterTargets:
        return cluster_targets(
            candidates,
            centroids,
            top.clusters[table_rows],
            top.similarities[table_rows],
            temperature=temperature,
            label_share=self.label_share,
        )


def temperatures(clusters: Clusters, settings: DistillSettings) -> tuple[float, float]:
    """Return τ_T of the images' and of the captions' distribution: as requested, else as stored."""
    if settings.cluster_temperature is not None:
        return settings.cluster_temperature, settings.cluster_temperature
    stored = clusters.sidecar.temperatures
    return stored["image"], stored.get("caption", stored["image"])


def open_lookup(
    teacher_inputs: TeacherInputs, axes: PrincipalAxes | None, settings: DistillSettings, device: torch.device
) -> ClusterLookup | None:
    """Make the lookup of a run; None where no loss asks for clusters."""
    clusters = teacher_inputs.clusters
    if clusters is None:
        return None
    image_temperature, caption_temperature = temperatures(clusters, settings)
    return ClusterLookup(
        centroids=open_centroids(clusters.centroids, axes, device),
        table_rows=teacher_inputs.samples.column("clusters"),
        images=clusters.images,
        captions=clusters.captions if teacher_inputs.text_clusters else None,
        image_temperature=image_temperature,
        caption_temperature=caption_temperature,
        label_share=settings.label_share,
        ratio=settings.candidate_ratio,
        minimum=settings.min_candidates,
        corrected=settings.candidate_correction,
        seed=settings.seed,
    )


def open_centroids(
    stored_KD: npt.NDArray[np.float32], axes: PrincipalAxes | None, device: torch.device
) -> ProjectedCentroids:
    """Make the centroids of a run, kept in the shared space where they take at most 64 MiB (an eighth of a GPU's memory).

    Args:
        stored_KD: Unit rows in the teacher's space, float32 [K, D], mapped from the file.
        axes: Axes of the shared space; None where it is the teacher's own.
    """
    max_bytes = _KEPT_BYTES
    if device.type == "cuda":
        max_bytes = torch.cuda.get_device_properties(device).total_memory // 8
    return ProjectedCentroids.of(stored_KD, axes, device, max_bytes)
