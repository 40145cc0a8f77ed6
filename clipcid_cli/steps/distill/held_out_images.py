"""Held-out images without captions: whether a student's row of an image is nearest to the teacher's row of that image."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from clipcid_cli.algorithms.metrics.chance import guess_own
from clipcid_cli.algorithms.metrics.retrieval import retrieval_ranks, score_ranks
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.steps.distill.held_out import BATCH, FP32, MAX_HELD_OUT
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.encode import Decoder

_SOUGHT = "teacher"


@dataclasses.dataclass(frozen=True)
class HeldOutImages:
    """Images decoded for the student, uint8 [N, H, W, 3], and the teacher's stored rows of them, float32 [N, D]."""

    student: ClipModel
    pixels: Tensor
    teacher_ND: Tensor

    @classmethod
    def read(cls, inputs: Inputs, student: ClipModel) -> HeldOutImages | None:
        """Read the first held-out images that the teacher has embedded; None where it has fewer than two."""
        stored = inputs.teacher.embeddings
        if stored is None or stored.width != student.info.embed_dim:
            return None
        embedded = inputs.held_out.column("embeddings")[:MAX_HELD_OUT].astype(np.int64)
        known = np.flatnonzero(embedded >= 0)
        samples = [ref.read() for ref in inputs.refs(inputs.held_out, known)]
        decoded = Decoder.from_model(student, captions=False)(samples)
        places = [place for place in range(len(samples)) if place not in decoded.failures]
        if len(places) < 2:
            return None
        assert decoded.pixels is not None
        rows = stored.rows(Kind.IMAGES).take(embedded[known[places]])
        return cls(student, decoded.pixels[places], torch.from_numpy(rows).float())

    @property
    def chance(self) -> dict[str, float]:
        """What a guess scores, by metric."""
        return guess_own(_SOUGHT, len(self.pixels))

    def measure(self, device: torch.device) -> dict[str, float]:
        """Measure how well an image, as the student encodes it, finds its own row of the teacher: all of `MEASURES`."""
        towers = Towers.from_model(self.student, FP32, BATCH)
        rows_ND = torch.cat([towers.images(part) for part in torch.split(self.pixels, BATCH)])
        ranks, _ = retrieval_ranks(self.teacher_ND.to(device), rows_ND, torch.arange(len(rows_ND), device=device))
        return score_ranks(_SOUGHT, ranks)
