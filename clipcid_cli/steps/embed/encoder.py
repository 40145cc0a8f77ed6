"""The model that `embed` encodes with: images and captions become rows of float16."""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any

import torch

from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.records import hash_preprocess
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.renderer import Renderer
from clipcid_cli.runtime.models.towers import Towers
from clipcid_cli.runtime.pipeline import start_worker_server
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.steps.embed.plan import EmbedPlan
from clipcid_cli.steps.encode import BATCH_SIZES, Decoded, Decoder, Encoded
from clipcid_cli.steps.preflight import choose_workers


@dataclasses.dataclass(frozen=True)
class EmbedEncoder:
    """Encodes batches of one size, so that a row's bits depend on its batch alone."""

    model: ClipModel
    precision: Precision
    # Pictures that are encoded together; `decoder.batch_size` counts samples, of which each may have views.
    batch_size: int
    workers: int
    decoder: Decoder

    @cached_property
    def towers(self) -> Towers:
        return Towers.from_model(self.model, self.precision, self.samples_at_once)

    @property
    def samples_at_once(self) -> int:
        """Samples of a full batch."""
        assert self.decoder.batch_size is not None, "batches are of one size"
        return self.decoder.batch_size

    @property
    def shapes(self) -> dict[Kind, tuple[int, ...]]:
        """Shape of what is made of a sample, by kind, but for captions after the first."""
        width = self.model.info.embed_dim
        shapes: dict[Kind, tuple[int, ...]] = {Kind.IMAGES: (width,)}
        if self.decoder.tokenizer is not None:
            shapes[Kind.TEXTS] = (width,)
        return shapes

    @property
    def bytes_per_sample(self) -> int:
        """What a sample takes on the disk, with its first caption, views and text variants, without its metadata."""
        return sum(kind.dtype.itemsize * math.prod(shape) for kind, shape in self.shapes.items())

    @property
    def settings(self) -> dict[str, Any]:
        """What of the model decides the rows, as JSON values."""
        info = self.model.info
        with_texts = self.decoder.tokenizer is not None
        return {
            "weights": info.weights_hash,
            "tokenizer": f"{info.tokenizer}, {info.context_length} tokens" if with_texts else None,
            "precision": self.precision.name,
            "batch_size": self.batch_size,
            "preprocess": hash_preprocess(info.preprocess, fast_decode=self.decoder.fast_decode),
        }

    def describe(self) -> str:
        """Say how it encodes, and what it makes beside images and captions."""
        precision = self.precision
        return (
            f"{self.model.info.parameters / 1e6:.1f} M parameters, precision {precision.name} ({precision.reason}), batches "
            f"of {self.batch_size}, {self.workers} worker{'' if self.workers == 1 else 's'} per process."
        )

    def __call__(self, decoded: Decoded) -> dict[Kind, torch.Tensor]:
        """Encode a batch: images [B, D], texts [M, D]."""
        assert decoded.pixels is not None
        rows = {Kind.IMAGES: self.towers.images(decoded.pixels).half().cpu()}
        if decoded.tokens is not None:
            rows[Kind.TEXTS] = self.towers.encode_texts(decoded.tokens).half()
        return without_zeros(rows)

    def finish(self, encoded: Encoded) -> None:
        """Change what depends on which samples of a batch can be used."""


def without_zeros(rows: dict[Kind, torch.Tensor]) -> dict[Kind, torch.Tensor]:
    """Return rows with NaN in place of a row of zeros, from which no distance can be measured."""
    return {kind: values.masked_fill(~values.any(dim=-1, keepdim=True), torch.nan) for kind, values in rows.items()}


def load_encoder(plan: EmbedPlan, context: DistContext) -> EmbedEncoder:
    """Load the model on every process."""
    settings = plan.settings
    workers = choose_workers(settings.workers, context.device)
    if workers:
        start_worker_server()
    model = context.on_all(load_model, plan.name, context.device)
    precision = choose_precision(settings.precision, context.device, "embed", model.info.parameters)
    model.cast_products(precision)
    batch_size = settings.batch_size or BATCH_SIZES[context.device.type]
    if settings.views or settings.text_variants:
        from clipcid_cli.steps.embed.augmented import make_augmenting

        return make_augmenting(settings, model, precision, batch_size, workers)
    decoder = Decoder(
        render=Renderer(model.info.preprocess),
        tokenizer=model.tokenizer if settings.text else None,
        batch_size=batch_size,
        fast_decode=settings.fast_decode,
    )
    return EmbedEncoder(model, precision, batch_size, workers, decoder)
