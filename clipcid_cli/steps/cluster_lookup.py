"""Which cluster centres a batch is compared with, and what the teacher said of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.algorithms.losses.cluster import Candidates, cluster_targets, draw_candidates
from clipcid_cli.algorithms.meeting_space import Rotation, bring
from clipcid_cli.formats.clusters_file import Clusters, TopClusters
from clipcid_cli.runtime.seeds import derive_seed
from clipcid_cli.steps.settings.distill import DistillSettings

# Candidates of the cluster loss are never fewer (or all centres, when there are fewer).
_MIN_CANDIDATES = 4096


@dataclasses.dataclass(frozen=True)
class ClusterLookup:
    """Clusters by row of the usable samples.

    Attributes:
        centres_KD: Unit rows in the meeting space, float32 [K, D].
        places: Row of the clusters' table of each usable sample, int64; −1 where there is none.
        images: The table's nearest centres of the images.
        captions: The same of the captions, where both towers are taught.
        image_temperature: τ_T of the images' distribution.
        caption_temperature: τ_T of the captions'.
        label_share: α.
        ratio: Share r of all centres drawn beside the batch's own.
        seed: Seed of the draws.
    """

    centres_KD: Tensor
    places: npt.NDArray[np.int64]
    images: TopClusters
    captions: TopClusters | None
    image_temperature: float
    caption_temperature: float
    label_share: float
    ratio: float
    seed: int

    def targets(self, rows: npt.NDArray[np.int64], step: int) -> tuple[ClusterTargets, ClusterTargets | None]:
        """Return the targets of a global batch: of its images, and of its captions where both towers are taught."""
        places = self.places[rows]
        tops = [self.images] if self.captions is None else [self.images, self.captions]
        named = np.concatenate([top.clusters[places].reshape(-1) for top in tops])
        candidates = draw_candidates(
            named,
            len(self.centres_KD),
            ratio=self.ratio,
            minimum=_MIN_CANDIDATES,
            seed=derive_seed("candidates", self.seed, step),
        )
        centres = self.centres_KD[torch.from_numpy(candidates.ids).to(self.centres_KD.device)]
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


def open_lookup(
    clusters: Clusters,
    places: npt.NDArray[np.int64],
    rotation: Rotation | None,
    settings: DistillSettings,
    device: torch.device,
) -> ClusterLookup:
    """Make the lookup of a run.

    Args:
        clusters: What `cluster` wrote.
        places: Row of the clusters' table of each usable sample; −1 where there is none.
        rotation: Axes of the meeting space; None where it is the teacher's own.
        settings: Towers, α, r and seed.
        device: Where the losses are computed.
    """
    return ClusterLookup(
        centres_KD=_bring_centres(clusters, rotation, device),
        places=places,
        images=clusters.images,
        captions=clusters.captions if settings.cluster_towers == "both" else None,
        image_temperature=clusters.image_temperature,
        caption_temperature=clusters.caption_temperature or clusters.image_temperature,
        label_share=settings.label_share,
        ratio=settings.candidate_ratio,
        seed=settings.seed,
    )


def _bring_centres(clusters: Clusters, rotation: Rotation | None, device: torch.device) -> Tensor:
    """Bring the cluster centres into the meeting space, block by block; float32 [K, D]."""
    blocks = [
        bring(torch.from_numpy(np.array(clusters.centroids[start : start + 65_536])).to(device), rotation)
        for start in range(0, len(clusters.centroids), 65_536)
    ]
    return torch.cat(blocks)
