"""Cluster discrimination: the student places its features among the teacher's cluster centres.

At K centres up to 10⁶ a batch is compared with a candidate set S = A ∪ R: all clusters the teacher named for the batch (A,
"active") and a uniform draw of the rest (R). Each drawn centre stands for (K − |A|)/|R| that were not drawn, so its logit is
raised by the logarithm of that: the softmax's normaliser is then an unbiased estimate of the full one. Without the
correction the teacher's own clusters look rarer among their rivals than they are and their share is inflated.

Shape legend: B batch, D width, S candidates, m stored clusters a sample.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipcid_cli.algorithms.losses.batch import ClusterTargets, LossBatch

# Logits of at most this many entries (64 MiB in float32) live at once; larger ones are made in chunks of rows and remade in
# the backward pass.
CHUNK_ENTRIES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Centres one batch is compared with.

    Attributes:
        ids: Their cluster numbers, each once: active ones ascending, then drawn ones ascending; int64 [S].
        num_active: How many of them are active.
        log_correction: log((K − |A|)/|R|), added to the logits of drawn candidates; 0 when nothing or everything is drawn.
    """

    ids: npt.NDArray[np.int64]
    num_active: int
    log_correction: float


def draw_candidates(
    top_clusters: npt.NDArray[np.integer], num_clusters: int, *, ratio: float, minimum: int, seed: int
) -> Candidates:
    """Draw the candidate centres of a global batch.

    Args:
        top_clusters: Stored clusters of the batch's samples, any shape, values in [0, K).
        num_clusters: K.
        ratio: Share r of all K centres to draw from the rest.
        minimum: Smallest number of candidates, active ones included (all K when there are fewer).
        seed: The same on every process, so that all compare with the same centres.

    Returns:
        The candidates; a function of the arguments only.

    Source: METHOD §3 [R]: the share is UNICOM's partial-FC, the correction ours.
    """
    active = np.unique(top_clusters).astype(np.int64)
    rest = num_clusters - len(active)
    wanted = max(math.ceil(ratio * num_clusters), min(num_clusters, minimum) - len(active))
    count = min(rest, max(0, wanted))
    if count == 0:
        return Candidates(active, len(active), 0.0)
    # A draw among the rest, numbered 0 … rest − 1, is moved past the active centres that lie before it.
    places = np.sort(np.random.default_rng(seed).choice(rest, size=count, replace=False))
    drawn = places + np.searchsorted(active - np.arange(len(active)), places, side="right")
    return Candidates(np.concatenate([active, drawn]), len(active), math.log(rest / count))


def cluster_targets(
    candidates: Candidates,
    centres_SD: Tensor,
    top_clusters: npt.NDArray[np.integer],
    top_similarities: npt.NDArray[np.floating],
    *,
    temperature: float,
    label_share: float,
) -> ClusterTargets:
    """Prepare what the loss needs of one batch.

    Args:
        candidates: The batch's candidates; they hold every id of `top_clusters`.
        centres_SD: Their centres, unit rows, float32 [S, D].
        top_clusters: Stored clusters of each sample, nearest first, [B, m].
        top_similarities: Cosine similarities to them, [B, m].
        temperature: τ_T of the teacher's distribution softmax(similarity/τ_T), over the m stored clusters: the others
            would get a share below e^((last − first)/τ_T) each.
        label_share: α: weight of the nearest cluster's one-hot target; 1 − α is the distribution's.

    Returns:
        The targets, on the device of `centres_SD`.
    """
    order = np.argsort(candidates.ids)
    positions = order[np.searchsorted(candidates.ids, top_clusters, sorter=order)]
    weights = torch.from_numpy(np.asarray(top_similarities, dtype=np.float32) / np.float32(temperature)).softmax(dim=1)
    weights = (1.0 - label_share) * weights
    weights[:, 0] += label_share
    device = centres_SD.device
    correction = torch.zeros(len(candidates.ids), device=device)
    correction[candidates.num_active :] = candidates.log_correction
    return ClusterTargets(centres_SD, correction, torch.from_numpy(positions).to(device), weights.to(device))


def cluster(batch: LossBatch, scale: Tensor) -> Tensor:
    """L_clu: cross-entropy of the student's softmax over centres to label and teacher distribution.

    −Σ_j q_j·log p_j with p = softmax(σ_c·s' Cᵀ + correction) over the candidates and q = α·label + (1 − α)·p_T. With text
    targets present the mean of both towers.

    Args:
        batch: Features with `image_clusters`, and `text_clusters` for both towers.
        scale: This loss's own σ_c.

    Returns:
        A scalar, in nats, mean over the batch.

    Source: CLIP-CID, arXiv 2408.09441 (k-means label, softmax and KL); weights, α and candidates are our reconstruction,
    METHOD §3 [R]; the text tower is our addition [O].
    """
    image, text = batch.student_in_teacher_space()
    assert batch.image_clusters is not None
    loss = soft_label_cross_entropy(image, batch.image_clusters, scale)
    if batch.text_clusters is None:
        return loss
    return 0.5 * (loss + soft_label_cross_entropy(text, batch.text_clusters, scale))


def soft_label_cross_entropy(
    features_BD: Tensor, targets: ClusterTargets, scale: Tensor, chunk_entries: int = CHUNK_ENTRIES
) -> Tensor:
    """Mean over rows of logΣexp(logits) − Σ_j q_j·logit_j, without a B × S matrix when that would be large.

    Args:
        features_BD: Unit rows [B, D].
        targets: Candidates and sparse target distributions.
        scale: σ_c, a scalar.
        chunk_entries: Largest B' × S block of logits that is kept for the backward pass; above it, blocks of rows of about
            this size are recomputed there. The value does not depend on it beyond rounding.

    Returns:
        A scalar.
    """
    rows = max(1, chunk_entries // max(1, len(targets.centres_SD)))
    if rows >= len(features_BD):
        return _row_losses(features_BD, targets.positions_Bm, targets.weights_Bm, targets, scale).mean()
    losses = [
        checkpoint(
            _row_losses,
            features_BD[start : start + rows],
            targets.positions_Bm[start : start + rows],
            targets.weights_Bm[start : start + rows],
            targets,
            scale,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, len(features_BD), rows)
    ]
    return torch.cat(losses).mean()


def _row_losses(
    features_bD: Tensor, positions_bm: Tensor, weights_bm: Tensor, targets: ClusterTargets, scale: Tensor
) -> Tensor:
    logits = scale * (features_bD @ targets.centres_SD.T) + targets.log_correction_S
    return logits.logsumexp(dim=1) - (weights_bm * logits.gather(1, positions_bm)).sum(dim=1)
