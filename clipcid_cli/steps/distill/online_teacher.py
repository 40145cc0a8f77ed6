"""A teacher that runs alongside the student."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from clipcid_cli.algorithms.losses.registry import LossEntry
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import FileRecord, hash_json
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import ClipModel, normalize_pixels
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.models.renderer import Processor
from clipcid_cli.runtime.models.views import apply_colors
from clipcid_cli.runtime.precision import Precision, choose_precision
from clipcid_cli.shown import short_name
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.teachers import Teacher, TeacherRows
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.steps.settings.distill import DistillSettings

SAMPLES_AT_ONCE = 256
"""Samples that the teacher takes at once, whatever the batch; no activations are kept."""


class RunningModel(NamedTuple):
    """A model that is loaded on this process's device."""

    model: ClipModel
    precision: Precision  # number format of its products


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineTeacher(Teacher):
    """A model that runs alongside the student, on the same views and captions.

    Stored embeddings of it, where there are any, only tell the axes of the shared space, and its repair.
    """

    online: ModelName
    running: RunningModel | None = None  # once it is loaded

    @property
    def _running(self) -> RunningModel:
        assert self.running is not None, "loaded on every process"
        return self.running

    @property
    def model_name(self) -> str:
        return short_name(self.online.spec)

    @property
    def width(self) -> int:
        return self._running.model.info.embed_dim

    @property
    def scale(self) -> float:
        return self._running.model.logit_scale

    @property
    def bias(self) -> float | None:
        return self._running.model.logit_bias

    @property
    def processor(self) -> Processor:
        return Processor.from_model(self._running.model)

    @cached_property
    def _image_map(self) -> Tensor | None:
        """What image features are multiplied by, as repaired rows are, [D, D]; None where they are taken as they are."""
        if self.embeddings is None or self.embeddings.image_map is None:
            return None
        return torch.from_numpy(self.embeddings.image_map.map_DD).to(self._running.model.device)

    def loaded(self, settings: DistillSettings, context: DistContext) -> OnlineTeacher:
        model = context.on_all(load_model, self.online, context.device)
        model.module.requires_grad_(False)
        precision = choose_precision(settings.precision, context.device, "embed", model.info.parameters)
        model.cast_products(precision)
        return dataclasses.replace(self, running=RunningModel(model, precision))

    def announce(self, losses: Collection[LossEntry]) -> None:
        model, precision = self._running
        info = model.info
        reporting.note(
            f"Online teacher: {info.parameters / 1e6:.1f} M parameters, {info.image_size[0]} px, "
            f"{info.context_length} tokens, precision {precision.name} ({precision.reason})."
        )

    @torch.no_grad()
    def rows(self, batch: TrainingBatch) -> TeacherRows:
        """Embed what the student is shown."""
        assert batch.teacher_pixels is not None, "workers have its processor"
        model, precision = self._running
        images, texts = [], []
        for start in range(0, len(batch), SAMPLES_AT_ONCE):
            part = slice(start, start + SAMPLES_AT_ONCE)
            pixels = batch.teacher_pixels[part]
            if batch.colors is not None:
                pixels = normalize_pixels(apply_colors(pixels, batch.colors[part]), model.info.preprocess)
            images.append(model.encode_images(pixels, precision))
            if batch.teacher_tokens is not None:
                texts.append(model.encode_texts(batch.teacher_tokens[part], precision))
        image = torch.cat(images)
        if self._image_map is not None:
            image = image.float() @ self._image_map
        return TeacherRows(image, torch.cat(texts) if texts else None)

    def fingerprints(self) -> list[FileRecord]:
        return [] if self.embeddings is None else self.embeddings.fingerprints([Kind.TEXTS])

    def describe_weights(self) -> list[FileRecord]:
        return [describe_weights(self._running.model)]


def describe_weights(model: ClipModel) -> FileRecord:
    """Describe a model as an input of the run: its weights, configuration, and what decides pixels and tokens."""
    info = model.info
    config = hash_json(info.config)
    content = f"{info.weights_hash} {config} {info.preprocess_hash} {info.tokenizer} {info.context_length}"
    return FileRecord(f"the teacher {info.spec}", info.parameters, content)
