"""What a training holds on each of its devices, computed, and the batch that fits: docs/gpu.md#what-is-computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from clipcid_cli.algorithms.costs import Clip
from clipcid_cli.algorithms.losses.registry import MASKED_IMAGES, MASKED_PATCHES, TOKENS
from clipcid_cli.steps.settings.distill import DistillSettings

SHARE_OF_DEFAULT = 0.8
"""Of a GPU's memory, what a batch of the default size may take; losses, exchange, fragments and the driver need the rest."""

# Of the values of an image: a byte in this batch and in the next one, and while a part of a batch is encoded the value in
# float32 and in 16 bits.
_READ_PIXEL, _ENCODED_PIXEL = 2, 6
# Of a number of a patch's or a token's feature: in float32, before and after its row is brought to length 1, with gradients.
_BYTES_OF_FEATURE = 16
# Parameters that are not trained have no gradient, and the optimiser keeps nothing of them.
_BYTES_OF_TRAINING = 12
_BYTES_OF_AVERAGE = 4
# Centroids that take more of a GPU's memory stay on the host (``algorithms/losses/cluster.py``).
_SHARE_OF_CENTROIDS = 1 / 8
# Samples that an online teacher takes at once.
_TEACHER_SAMPLES = 256


class TrainingMemory(NamedTuple):
    """Bytes on a device."""

    fixed: float  # whatever the batch: weights, gradients, the optimiser's state, a teacher, centroids
    per_sample: float

    def needed(self, samples: int) -> float:
        """Return the bytes that training on so many samples at once takes."""
        return self.fixed + samples * self.per_sample

    def largest(self, memory: float) -> int:
        """Return how many samples fit into so many bytes; 0 where not even the weights do."""
        return max(0, math.floor((memory - self.fixed) / self.per_sample))


def training_memory(
    settings: DistillSettings,
    clip: Clip,
    fixed: float,
    *,
    mixed: bool,
    extra_texts: float = 0.0,
    teachers: Sequence[Clip] = (),
) -> TrainingMemory:
    """Compute what a training holds on each device.

    Args:
        clip: The student.
        fixed: Bytes of weights, gradients and the optimiser's state, and of what else is kept from step to step.
        mixed: Whether it trains in 16 bits.
        extra_texts: Further texts for each sample.
        teachers: Models that run alongside the student.
    """
    read = frozenset[str]().union(*(loss.reads for loss in settings.losses))
    encoded = float(_ENCODED_PIXEL * clip.image_bytes)
    if not settings.freeze_image:
        seen = 2 - MASKED_PATCHES if MASKED_IMAGES in read else 1
        encoded += seen * clip.image.kept_bytes(mixed=mixed, recomputed=settings.grad_checkpointing)
    if settings.trains_text:
        texts = 1 + extra_texts
        encoded += texts * clip.text.kept_bytes(mixed=mixed, recomputed=settings.grad_checkpointing)
    if TOKENS in read:
        encoded += _BYTES_OF_FEATURE * clip.embed_dim * (clip.image.tokens + clip.text.tokens)
    fixed += sum(teacher.encoder_bytes(_TEACHER_SAMPLES) for teacher in teachers)
    return TrainingMemory(fixed, _READ_PIXEL * clip.image_bytes + encoded / settings.accum_freq)


def planned_states(settings: DistillSettings, clip: Clip, memory: float, centroids: int) -> float:
    """Return the bytes that a student and what is kept with it will take on a device, computed before it is loaded.

    Args:
        memory: Of the device.
        centroids: Clusters that the run compares with.
    """
    states = float(clip.state_bytes)
    if settings.freeze_image:
        states -= _BYTES_OF_TRAINING * clip.image.parameters
    if not settings.trains_text:
        states -= _BYTES_OF_TRAINING * clip.text.parameters
    if settings.ema is not None:
        states += _BYTES_OF_AVERAGE * clip.parameters
    return states + min(4.0 * centroids * clip.embed_dim, _SHARE_OF_CENTROIDS * memory)
