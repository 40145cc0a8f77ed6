"""A batch as a process trains on it: what is shown, the stored rows of that, and the targets of the cluster loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import ClusterTargets
from clipcid_cli.runtime.pipeline import join_on

HOST = torch.device("cpu")


@dataclasses.dataclass
class TrainingBatch:
    """One process's part of a batch, or some of it."""

    pixels: Tensor  # uint8 [b, H, W, 3]
    colors: Tensor | None  # colour maps, float32 [b, 3, 4]; None where none changes anything
    tokens: Tensor | None  # of captions and of further texts, int64 [b + e, L]; None where no text tower runs
    bad: list[tuple[str, str]]  # (reason, key) of images that could not be decoded; they are white in `pixels`
    # Numbers of each sample that losses read, float32 [b, n]: a column for each name of `list_sample_inputs`.
    sample_inputs_bn: Tensor | None = None
    kept_patches: Tensor | None = None  # patches of each image that are seen where the others are masked, int64 [b, n]
    # A stored teacher's rows of what is shown, float16; so for captions and further texts.
    teacher_image_bD: Tensor | None = None
    teacher_text_bD: Tensor | None = None
    teacher_extra_eD: Tensor | None = None
    teacher_pixels: Tensor | None = None  # the same views at an online teacher's size, uint8 [b, H, W, 3]
    teacher_tokens: Tensor | None = None  # the same captions by its tokenizer, int64 [b, L]
    # Targets of the global batch's images; of its captions, where both towers are taught.
    image_clusters: ClusterTargets | None = None
    text_clusters: ClusterTargets | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def count_bytes(self, samples: int, extra_texts: int) -> int:
        """Return the bytes of the tensors of a part with so many samples and further texts, whose rows are like these."""
        rows = {"tokens": samples + extra_texts, "teacher_extra_eD": extra_texts}
        return sum(
            rows.get(name, samples) * math.prod(value.shape[1:]) * value.element_size()
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        )

    def copied(self) -> TrainingBatch:
        """Return it out of shared memory."""
        tensors: dict[str, Any] = {
            name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)

    @classmethod
    def join(cls, parts: Sequence[TrainingBatch], device: torch.device) -> TrainingBatch:
        """Join the parts of a process, in order, on a device; all but tokens, which the towers pack on the host."""
        bad = [image for part in parts for image in part.bad]
        batch = dataclasses.replace(parts[0], tokens=_join_tokens(parts), bad=bad)
        for field in dataclasses.fields(cls):
            values = [getattr(part, field.name) for part in parts]
            if isinstance(values[0], Tensor) and field.name != "tokens":
                place = HOST if field.name == "teacher_tokens" else device
                setattr(batch, field.name, join_on(place, values))
        return batch


def _join_tokens(parts: Sequence[TrainingBatch]) -> Tensor | None:
    """Put the captions of all parts before their further texts."""
    tokens = [part.tokens for part in parts if part.tokens is not None]
    if not tokens:
        return None
    captions = [rows[: len(part)] for part, rows in zip(parts, tokens, strict=True)]
    further = [rows[len(part) :] for part, rows in zip(parts, tokens, strict=True)]
    return torch.cat(captions + further)
