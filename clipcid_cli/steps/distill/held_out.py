"""The held-out part of the data: read once, and measured by retrieval whenever a student is evaluated."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from clipcid_cli.algorithms.metrics.chance import guess_captions
from clipcid_cli.algorithms.metrics.retrieval import retrieval_metrics, retrieval_ranks
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.runtime.precision import Precision
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.encode import Decoded, Decoder, Encoded

# Held-out samples beyond this many are left to eval-zeroshot: evaluation during training should take seconds.
MAX_HELD_OUT = 5_000
BATCH = 256
FP32 = Precision("fp32", "evaluation")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out samples that can be read, decoded for the model: up to 0.75 GB of pixels at 224 px."""

    student: ClipModel
    samples: list[Sample]
    rows: list[int]  # their rows among all samples held out
    decoded: Decoded

    @classmethod
    def read(cls, inputs: Inputs, student: ClipModel) -> HeldOut | None:
        """Read the first held-out samples; None when fewer than two have a caption, which retrieval cannot use."""
        first = np.arange(min(inputs.held_out.total, MAX_HELD_OUT))
        every = [ref.read() for ref in inputs.refs(inputs.held_out, first)]
        rows = [row for row, sample in enumerate(every) if sample.captions]
        if len(rows) < 2:
            return None
        decode = Decoder.from_model(student, captions=True)
        samples = [every[row] for row in rows]
        decoded = decode(samples)
        if decoded.failures:
            rows = [row for place, row in enumerate(rows) if place not in decoded.failures]
            if len(rows) < 2:
                return None
            samples = [every[row] for row in rows]
            decoded = decode(samples)
        return cls(student, samples, rows, decoded)

    def encode(self) -> Encoded:
        """Encode images and captions in full precision: unit rows, float32, on the CPU."""
        self.student.module.eval()
        towers = Towers.from_model(self.student, FP32, BATCH)
        assert self.decoded.pixels is not None
        assert self.decoded.tokens is not None
        images = torch.cat([towers.images(pixels).cpu() for pixels in torch.split(self.decoded.pixels, BATCH)])
        return Encoded(self.samples, {Kind.IMAGES: images, Kind.TEXTS: towers.encode_texts(self.decoded.tokens)})

    @property
    def chance(self) -> dict[str, float]:
        """What a guess scores, by metric."""
        return guess_captions(np.array([len(sample.captions) for sample in self.samples]))

    def measure(self, encoded: Encoded, device: torch.device) -> dict[str, float]:
        """Measure what a model made of these samples, by the metrics of `eval-zeroshot`."""
        images, texts = (encoded.rows[kind].to(device) for kind in (Kind.IMAGES, Kind.TEXTS))
        image_ranks, text_ranks = retrieval_ranks(images, texts, encoded.owners.to(device))
        return retrieval_metrics((image_ranks.cpu(), text_ranks.cpu()), encoded.owners).values()
