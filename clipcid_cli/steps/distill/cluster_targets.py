"""Which cluster centres a batch is compared with, and what the teacher said of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.algorithms.losses.cluster import Candidates, cluster_targets, draw_candidates
from clipcid_cli.algorithms.losses.shared_space import Rotation, bring
from clipcid_cli.formats.results.clusters import Clusters, TopClusters
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps.distill.teacher_inputs import Teaching
from clipcid_cli.steps.settings.distill import DistillSettings

# Centres that take at most this many bytes in the meeting space are kept there: K = 32,768 at 512 dimensions.
_KEPT_BYTES = 64 * 2**20
# Centres are read and brought into the meeting space this many at a time.
_ROWS_AT_ONCE = 8192


@dataclasses.dataclass(frozen=True)
class Centres:
    """Cluster centres in the meeting space, read from their file as they are asked for.

    Few enough centres are kept in the meeting space; of many, only the rows asked for are read, rotated and cut, each time
    anew, so that memory never holds K rows.

    Attributes:
        file_KD: Unit rows in the teacher's space, float32 [K, D], mapped from the file.
        rotation: Axes of the meeting space; None where it is the teacher's own.
        device: Where rows are wanted.
        kept_Kd: All rows in the meeting space, where they are few enough.
    """

    file_KD: npt.NDArray[np.float32]
    rotation: Rotation | None
    device: torch.device
    kept_Kd: Tensor | None = None

    def __len__(self) -> int:
        """Return K."""
        return len(self.file_KD)

    @property
    def width(self) -> int:
        """Dimensions of the meeting space."""
        return int(self.file_KD.shape[1] if self.rotation is None else self.rotation.axes_Dd.shape[1])

    def take(self, ids: npt.NDArray[np.int64]) -> Tensor:
        """Return centres by number: unit rows of the meeting space, float32 [n, d], on the device."""
        if self.kept_Kd is not None:
            return self.kept_Kd[torch.from_numpy(ids).to(self.device)]
        taken_nd = torch.empty(len(ids), self.width, device=self.device)
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            rows_bD = torch.from_numpy(np.take(self.file_KD, ids[first : first + _ROWS_AT_ONCE], axis=0))
            taken_nd[first : first + _ROWS_AT_ONCE] = bring(rows_bD.to(self.device), self.rotation)
        return taken_nd


def open_centres(file_KD: npt.NDArray[np.float32], rotation: Rotation | None, device: torch.device) -> Centres:
    """Make the centres of a run, kept in the meeting space where they take at most 64 MiB (an eighth of a GPU's memory).

    Args:
        file_KD: Unit rows in the teacher's space, float32 [K, D], mapped from the file.
        rotation: Axes of the meeting space; None where it is the teacher's own.
        device: Where the losses are computed.
    """
    centres = Centres(file_KD, rotation, device)
    limit = _KEPT_BYTES
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory // 8
    if len(centres) * centres.width * 4 > limit:
        return centres
    return dataclasses.replace(centres, kept_Kd=centres.take(np.arange(len(centres))))


@dataclasses.dataclass(frozen=True)
class ClusterLookup:
    """Clusters by row of the usable samples.

    Attributes:
        centres: All centres.
        places: Row of the clusters' table of each usable sample, int64; −1 where there is none.
        images: The table's nearest centres of the images.
        captions: The same of the captions, where both towers are taught.
        image_temperature: τ_T of the images' distribution.
        caption_temperature: τ_T of the captions'.
        label_share: α.
        ratio: Share r of all centres drawn beside the batch's own.
        minimum: Smallest number of candidates.
        corrected: Whether a drawn centre counts for all those it stands for.
        seed: Seed of the draws.
    """

    centres: Centres
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
            len(self.centres),
            ratio=self.ratio,
            minimum=self.minimum,
            seed=derive_seed("candidates", self.seed, step),
        )
        if not self.corrected:
            candidates = dataclasses.replace(candidates, log_correction=0.0)
        centres = self.centres.take(candidates.ids)
        images = self._tower(candidates, centres, self.images, places, self.image_temperature)
        if self.captions is None:
            return images, None
        return images, self._tower(candidates, centres, self.captions, places, self.caption_temperature)

    def _tower(
        self,
        candidates: Candidates,
        centres: Tensor,
        top: TopClusters,
        places: npt.NDArray[np.int64],
        temperature: float,
    ) -> ClusterTargets:
        return cluster_targets(
            candidates,
            centres,
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
    teaching: Teaching, rotation: Rotation | None, settings: DistillSettings, device: torch.device
) -> ClusterLookup | None:
    """Make the lookup of a run; None where no loss asks for clusters.

    Args:
        teaching: Clusters, where they are joined with the data, and whether they teach the text tower.
        rotation: Axes of the meeting space; None where it is the teacher's own.
        settings: α, r, τ_T and seed.
        device: Where the losses are computed.
    """
    clusters, places = teaching.clusters, teaching.cluster_places
    if clusters is None or places is None:
        return None
    image_temperature, caption_temperature = temperatures(clusters, settings)
    return ClusterLookup(
        centres=open_centres(clusters.centroids, rotation, device),
        places=places,
        images=clusters.images,
        captions=clusters.captions if teaching.text_clusters else None,
        image_temperature=image_temperature,
        caption_temperature=caption_temperature,
        label_share=settings.label_share,
        ratio=settings.candidate_ratio,
        minimum=settings.min_candidates,
        corrected=settings.candidate_correction,
        seed=settings.seed,
    )
