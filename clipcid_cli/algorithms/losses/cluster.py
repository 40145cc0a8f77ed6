"""Cluster discrimination: the student places its features among the teacher's cluster centroids.

With K centroids up to 10⁶ a batch is compared with a candidate set S = A ∪ R: the nearest clusters of its samples (A,
"active") and a uniform draw of the rest (R). Each drawn centroid represents (K − |A|)/|R| centroids, so the logarithm of
that is added to its logit: the softmax's normaliser is then an unbiased estimate of the full one, though its logarithm
is not. Without the correction the other centroids count too little and the probability of the active ones is inflated.

Shape legend: B batch, K centroids, D width, d width of the shared space, S candidates, m stored clusters a sample.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import (
    ClusterTargets,
    LossBatch,
    add,
    block_entries,
    over_blocks,
    rows_between,
)
from clipcid_cli.algorithms.losses.half_products import LogSumExp
from clipcid_cli.algorithms.losses.shared_space import PrincipalAxes, project

# Centroids that take at most this many bytes in the shared space are kept there: K = 32,768 at 512 dimensions.
_KEPT_BYTES = 64 * 2**20
# Centroids are read and projected this many at a time.
_ROWS_AT_ONCE = 8192
# Of each sample this many of its nearest clusters are active. More cost time and teach no better (recipes/ablation): they
# stay in the target, and the draw stands for them in the normaliser.
_NUM_ACTIVE = 4


class ProjectedCentroids:
    """Centroids in the shared space: few are projected once and kept, of many only those that are asked for are read.

    Few take at most 64 MiB, or an eighth of a GPU's memory; `kept_Kd` holds them.
    """

    def __init__(self, stored_KD: npt.NDArray[np.float32], axes: PrincipalAxes | None, device: torch.device) -> None:
        """Take unit rows in the teacher's space, mapped from a file."""
        self._stored_KD, self._axes, self._device = stored_KD, axes, device
        self.width = int(stored_KD.shape[1] if axes is None else axes.basis_Dd.shape[1])
        max_bytes = _KEPT_BYTES
        if device.type == "cuda":
            max_bytes = torch.cuda.get_device_properties(device).total_memory // 8
        self.kept_Kd: Tensor | None = None
        if len(self) * self.width * 4 <= max_bytes:
            self.kept_Kd = self.take(np.arange(len(self)))

    def __len__(self) -> int:
        return len(self._stored_KD)

    def take(self, ids: npt.NDArray[np.int64]) -> Tensor:
        """Return centroids by number: unit rows of the shared space, float32 [n, d], on the device."""
        if self.kept_Kd is not None:
            return self.kept_Kd[torch.from_numpy(ids).to(self._device)]
        taken_nd = torch.empty(len(ids), self.width, device=self._device)
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            rows_bD = torch.from_numpy(np.take(self._stored_KD, ids[first : first + _ROWS_AT_ONCE], axis=0))
            if self._device.type == "cuda":
                rows_bD = rows_bD.pin_memory()  # neither the host nor another stream waits for the copy
            taken_nd[first : first + _ROWS_AT_ONCE] = project(rows_bD.to(self._device, non_blocking=True), self._axes)
        return taken_nd


@dataclasses.dataclass(frozen=True)
class ClusterCandidates:
    """Centroids one batch is compared with."""

    # Their cluster numbers, each once: active ones ascending, then drawn ones ascending; int64 [S].
    ids: npt.NDArray[np.int64]
    log_correction_S: npt.NDArray[np.float32]  # 0 for active ones, log((K − |A|)/|R|) for drawn ones; float32


def draw_candidates(
    top_clusters: npt.NDArray[np.integer],
    num_clusters: int,
    *,
    ratio: float,
    minimum: int,
    seed: int,
    corrected: bool = True,
) -> ClusterCandidates:
    """Draw the candidate centroids of a global batch, on every process the same.

    Args:
        top_clusters: Stored clusters of each of the batch's images and captions, nearest first, [n, m].
        ratio: Share r of all K centroids to draw from those that are not active.
        minimum: Smallest number of candidates, active ones included.
        corrected: Whether drawn centroids stand for the rest; if not, nothing would for stored clusters that are not active.

    Source: docs/method.md#candidates; the share is UNICOM's partial-FC, the active ones and the correction are ours.
    """
    # A mask of all K: sorting the clusters of 32,768 samples took longer than a step on a GPU.
    is_active = np.zeros(num_clusters, dtype=bool)
    drawn_for_rest = ratio > 0 and corrected
    is_active[top_clusters[:, :_NUM_ACTIVE] if drawn_for_rest else top_clusters] = True
    active = np.flatnonzero(is_active)
    rest = num_clusters - len(active)
    requested = max(math.ceil(ratio * num_clusters), min(num_clusters, minimum) - len(active))
    count = min(rest, max(0, requested))
    is_drawn = np.zeros(rest, dtype=bool)
    is_drawn[np.random.default_rng(seed).choice(rest, size=count, replace=False)] = True
    ids = np.concatenate([active, np.flatnonzero(~is_active)[is_drawn]])
    log_correction_S = np.zeros(len(ids), dtype=np.float32)
    if count > 0 and corrected:
        log_correction_S[len(active) :] = math.log(rest / count)
    return ClusterCandidates(ids, log_correction_S)


def soft_labels(top_similarities: npt.NDArray[np.floating], *, temperature: float, label_share: float) -> Tensor:
    """Return the target distributions q over the stored clusters of each sample, float32 [B, m].

    Args:
        top_similarities: Cosine similarities to them, nearest first, [B, m].
        temperature: τ_T of the teacher's distribution softmax(similarity/τ_T), over the m stored clusters: the others
            would get a share below e^((last − first)/τ_T) each.
        label_share: α: weight of the nearest cluster's one-hot target; 1 − α is the distribution's.
    """
    q_Bm = torch.from_numpy(np.asarray(top_similarities, dtype=np.float32) / np.float32(temperature)).softmax(dim=1)
    q_Bm = (1.0 - label_share) * q_Bm
    q_Bm[:, 0] += label_share
    return q_Bm


def mean_centroids(centroids: ProjectedCentroids, top_clusters: npt.NDArray[np.integer], q_Bm: Tensor) -> Tensor:
    """Return Σ_j q_j·c_j of each sample's stored clusters, [B, m], and their target distribution: float32 [B, d]."""
    at_once = max(1, _ROWS_AT_ONCE // top_clusters.shape[1])
    means = []
    for first in range(0, len(top_clusters), at_once):
        ids_bm = top_clusters[first : first + at_once].astype(np.int64)
        stored_bmd = centroids.take(ids_bm.reshape(-1)).view(*ids_bm.shape, -1)
        q_bm = q_Bm[first : first + at_once].to(stored_bmd.device)
        means.append((q_bm[:, :, None] * stored_bmd).sum(dim=1))
    return torch.cat(means)


def cluster(batch: LossBatch, scale: Tensor) -> Tensor:
    """L_clu: cross-entropy of the student's softmax over centroids to label and teacher distribution.

    −Σ_j q_j·log p_j with p = softmax(σ_c·s' Cᵀ + correction) over the candidates and q = α·label + (1 − α)·p_T. With
    targets of both towers the mean of both. In nats.

    Source: CLIP-CID, arXiv 2408.09441 (k-means label, softmax and KL); weights, α and candidates are our reconstruction,
    docs/method.md#cluster-loss; the text tower is our addition.
    """
    towers = ((batch.image_BD, batch.image_clusters), (batch.text_BD, batch.text_clusters))
    sums = [
        soft_label_cross_entropy(features, targets, scale, batch.own)
        for features, targets in towers
        if targets is not None
    ]
    return add(sums) / (len(sums) * len(batch))


def soft_label_cross_entropy(
    features_BD: Tensor, targets: ClusterTargets, scale: Tensor, own: slice = slice(None)
) -> Tensor:
    """Sum over own rows of logΣexp(logits) − Σ_j q_j·logit_j, without a B × S matrix when that would be large."""
    first, stop, _ = own.indices(len(features_BD))
    scaled_bD = scale * rows_between(features_BD, first, stop)

    def normaliser(start: int, end: int) -> Tensor:
        logits_bC = torch.addmm(targets.log_correction_S[start:end], scaled_bD, targets.centroids_SD[start:end].T)
        return logits_bC.logsumexp(dim=1)

    # Blocks of candidates rather than of rows: a matrix product repacks its right side every time, and the candidates are
    # the larger one (1,024 rows, 116,241 candidates, 768 dimensions: two thirds of the time).
    if features_BD.device.type == "cuda":
        normalisers = _normalisers_of_halves(scaled_bD, targets)
    else:
        normalisers = over_blocks(normaliser, 0, len(targets.centroids_SD), stop - first, features_BD.device)
    normaliser_b = normalisers[0] if len(normalisers) == 1 else torch.stack(normalisers).logsumexp(dim=0)
    # Σ_j q_j·logit_j = σ_c·s'·Σ_j q_j·c_j, where no logit is corrected: it needs neither the logits nor their candidates.
    return normaliser_b.sum() - (scaled_bD * targets.mean_bD).sum()


def _normalisers_of_halves(scaled_bD: Tensor, targets: ClusterTargets) -> list[Tensor]:
    """Return logΣexp of each row's logits, [b], for each block of candidates, by products of float16 parts."""
    rows = max(1, block_entries(scaled_bD.device) // len(scaled_bD))
    blocks = zip(torch.split(targets.centroids_SD, rows), torch.split(targets.log_correction_S, rows), strict=True)
    return [
        LogSumExp.apply(scaled_bD, centroids_CD, correction_C)  # type: ignore[no-untyped-call, unused-ignore]  # untyped in PyTorch 2.13, typed in 2.15
        for centroids_CD, correction_C in blocks
    ]
