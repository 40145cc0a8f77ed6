"""Which cluster centroids a batch is compared with, and what the teacher said of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.algorithms.losses.cluster import ClusterCandidates, cluster_targets, draw_candidates
from clipcid_cli.algorithms.losses.shared_space import PrincipalAxes, project
from clipcid_cli.formats.results.clusters import Clusters, TopClusters
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps.distill.teacher_inputs import TeacherInputs
from clipcid_cli.steps.settings.distill import DistillSettings

# Centroids that take at most this many bytes in the meeting space are kept there: K = 32,768 at 512 dimensions.
_KEPT_BYTES = 64 * 2**20
# Centroids are read and brought into the meeting space this many at a time.
_ROWS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class Centroids:
    """Cluster centroids in the meeting space, read from their file as they are asked for.

    Few enough centroids are kept in the meeting space; of many, only the rows asked for are read, rotated and cut, each time
    anew, so that memory never holds K rows.

    Attributes:
        file_KD: Unit rows in the teacher's space, float32 [K, D], mapped from the file.
        axes: Axes of the meeting space; None where it is the teacher's own.
        kept_Kd: All rows in the meeting space, where they are few enough.
    """

    file_KD: npt.NDArray[np.float32]
    axes: PrincipalAxes | None
    device: torch.device
    kept_Kd: Tensor | None = None

    def __len__(self) -> int:
        """Return K."""
        return len(self.file_KD)

    @property
    def width(self) -> int:
        """Dimensions of the meeting space."""
        return int(self.file_KD.shape[1] if self.axes is None else self.axes.basis_Dd.shape[1])

    def take(self, ids: npt.NDArray[np.int64]) -> Tensor:
        """Return centroids by number: unit rows of the meeting space, float32 [n, d], on the device."""
        if self.kept_Kd is not None:
            return self.kept_Kd[torch.from_numpy(ids).to(self.device)]
        taken_nd = torch.empty(len(ids), self.width, device=self.device)
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            rows_bD = torch.from_numpy(np.take(self.file_KD, ids[first : first + _ROWS_AT_ONCE], axis=0))
            taken_nd[first : first + _ROWS_AT_ONCE] = project(rows_bD.to(self.device), self.axes)
        return taken_nd


def open_centroids(file_KD: npt.NDArray[np.float32], axes: PrincipalAxes | None, device: torch.device) -> Centroids:
    """Make the centroids of a run, kept in the meeting space where they take at most 64 MiB (an eighth of a GPU's memory).

    Args:
        file_KD: Unit rows in the teacher's space, float32 [K, D], mapped from the file.
        axes: Axes of the meeting space; None where it is the teacher's own.
        device: Where the losses are computed.
    """
    centroids = Centroids(file_KD, axes, device)
    limit = _KEPT_BYTES
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory // 8
    if len(centroids) * centroids.width * 4 > limit:
        return centroids
    return dataclasses.replace(centroids, kept_Kd=centroids.take(np.arange(len(centroids))))


@dataclasses.dataclass(frozen=True)
class ClusterLookup:
    """Clusters by row of the usable samples.

    Attributes:
        places: Row of the clusters' table of each usable sample, int64; −1 where there is none.
        images: The table's nearest centroids of the images.
        captions: The same of the captions, where both towers are taught.
        image_temperature: τ_T of the images' distribution.
        ratio: Share r of all centroids drawn beside the batch's own.
        corrected: Whether a drawn centroid counts for all those it stands for.
    """

    centroids: Centroids
    places: npt.NDArray[np.int64]
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
        """Return the targets of a global batch: of its images, and of its captions where both towers are taught."""
        places = self.places[rows]
        tops = [self.images] if self.captions is None else [self.images, self.captions]
        named = np.concatenate([top.clusters[places].reshape(-1) for top in tops])
        candidates = draw_candidates(
            named,
            len(self.centroids),
            ratio=self.ratio,
            minimum=self.minimum,
            seed=derive_seed("candidates", self.seed, step),
        )
        if not self.corrected:
            candidates = dataclasses.replace(candidates, log_correction=0.0)
        centroids = self.centroids.take(candidates.ids)
        images = self._tower(candidates, centroids, self.images, places, self.image_temperature)
        if self.captions is None:
            return images, None
        return images, self._tower(candidates, centroids, self.captions, places, self.caption_temperature)

    def _tower(
        self,
        candidates: ClusterCandidates,
        centroids: Tensor,
        top: TopClusters,
        places: npt.NDArray[np.int64],
        temperature: float,
    ) -> ClusterTargets:
        return cluster_targets(
            candidates,
            centroids,
            top.clusters[places],
            top.similarities[places],
            temperature=temperature,
            label_share=self.label_share,
        )


def temperatures(clusters: Clusters, settings: DistillSettings) -> tuple[float, float]:
    """Return τ_T of the images' and of the captions' distribution: as asked for, else as stored."""
    stored = clusters.image_temperature, clusters.caption_temperature or clusters.image_temperature
    return stored if settings.cluster_temperature is None else (settings.cluster_temperature,) * 2


def open_lookup(
    teacher_inputs: TeacherInputs, axes: PrincipalAxes | None, settings: DistillSettings, device: torch.device
) -> ClusterLookup | None:
    """Make the lookup of a run; None where no loss asks for clusters.

    Args:
        teacher_inputs: Clusters, where they are joined with the data, and whether they teach the text tower.
        axes: Axes of the meeting space; None where it is the teacher's own.
        settings: α, r, τ_T and seed.
        device: Where the losses are computed.
    """
    clusters, places = teacher_inputs.clusters, teacher_inputs.cluster_places
    if clusters is None or places is None:
        return None
    image_temperature, caption_temperature = temperatures(clusters, settings)
    return ClusterLookup(
        centroids=open_centroids(clusters.centroids, axes, device),
        places=places,
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
