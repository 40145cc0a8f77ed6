"""What a student is trained for: the weighted sum of a run's losses over one global batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipcid_cli.algorithms.losses.batch import LossBatch, rows_between
from clipcid_cli.algorithms.losses.registry import LossEntry, list_sample_inputs, load_loss
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace, project
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.teachers import Teacher
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.training.gradients import Features, gather_rows


@dataclasses.dataclass(frozen=True)
class Compared:
    """The losses of a step."""

    # What the gradients are of: the weighted sum of the losses of the global batch, or (with local losses) of this process's
    # rows, times the number of processes.
    total: Tensor
    losses: dict[str, Tensor]  # of the global batch by name, without weights and gradients, float32 [] each


@dataclasses.dataclass(frozen=True)
class Objective:
    """The losses of a run, with their weights."""

    weights: dict[str, float]
    functions: dict[LossEntry, Callable[..., Tensor]]  # in the same order
    sample_inputs: list[str]  # numbers of each sample that they read
    parameters: LossParameters
    teacher: Teacher
    space: SharedSpace  # where features of student and teacher are compared
    context: DistContext
    affinity_scale: float
    local_loss: bool  # whether each process computes the losses of its own rows only, against everybody's

    @classmethod
    def from_inputs(cls, inputs: Inputs, student_width: int, space: SharedSpace, context: DistContext) -> Objective:
        """Make the losses of a run, and say which they are."""
        settings, losses = inputs.settings, inputs.losses
        weights = dict[str, float]()
        functions = dict[LossEntry, Callable[..., Tensor]]()
        for loss, weight in losses.items():
            weights[loss.name] = weight.at(space.width)
            functions[loss] = _load(loss, settings)
        why = "" if losses == settings.losses else " (the teacher is near chance)"
        reporting.note("Loss: " + " + ".join(f"{value:g}·{name}" for name, value in weights.items()) + f"{why}.")
        seed = derive_seed("loss parameters", settings.seed)
        parameters = LossParameters(losses, student_width, space, seed).to(context.device)
        local_loss = settings.local_loss and context.size > 1
        return cls(
            weights=weights,
            functions=functions,
            sample_inputs=list_sample_inputs(losses),
            parameters=parameters,
            teacher=inputs.teacher,
            space=space,
            context=context,
            affinity_scale=settings.affinity_scale,
            local_loss=local_loss,
        )

    def make_loss_batch(
        self, features: Features, student_scale: Tensor, student_bias: Tensor | None, batch: TrainingBatch
    ) -> LossBatch:
        """Make what the losses read of the global batch; call it on every process.

        Rows are of unit length, in the shared space.
        """
        count = len(batch)
        size, start = self.context.size, self.context.rank * count
        num_extra = 0 if features.text is None else len(features.text) - count
        rows = self._student_rows(features, batch) | self._teacher_rows(batch)
        if features.text is None:  # the text tower is the teacher's: so are its rows
            rows["text_Bd"] = rows["text_BD"] = rows.get("teacher_text_BD", rows["image_Bd"][:0])
        sample_inputs = {}
        if self.sample_inputs:
            columns = rows.pop("sample_inputs_Bn").unbind(1)
            sample_inputs = dict(zip(self.sample_inputs, columns, strict=True))
        return LossBatch(
            **rows,
            sample_inputs=sample_inputs,
            trains_text=features.text is not None,
            student_scale=student_scale,
            student_bias=student_bias,
            teacher_scale=self.teacher.scale,
            teacher_bias=self.teacher.bias,
            affinity_scale=self.affinity_scale,
            image_clusters=batch.image_clusters,
            text_clusters=batch.text_clusters,
            num_extra=size * num_extra,
            own=slice(start, start + count) if self.local_loss else slice(0, size * count),
        )

    def compare(self, batch: LossBatch) -> Compared:
        """Compute the losses of a step; call it on every process."""
        terms, weighted = list[Tensor](), list[Tensor]()
        for loss, function in self.functions.items():
            arguments = self.parameters.of(loss.name)
            arguments |= {name: batch.sample_inputs[name] for name in loss.sample_inputs}
            terms.append(function(batch, **arguments))
            weighted.append(self.weights[loss.name] * terms[-1])
        total = torch.stack(weighted).sum()
        values = torch.stack([term.detach() for term in terms])
        if self.local_loss:
            total = total * self.context.size
            values = self.context.sum_(values)
        return Compared(total, dict(zip(self.weights, values.unbind(), strict=True)))

    def _student_rows(self, features: Features, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the student's rows by their names in `LossBatch`, and the numbers of samples that losses read."""
        count = len(batch)
        projected = self._project(features)
        # What losses compare with all rows goes in one exchange, with the numbers of samples.
        own = {name: rows_between(rows, 0, count) for name, rows in projected.items()}
        if batch.sample_inputs_bn is not None:
            own["sample_inputs_Bn"] = batch.sample_inputs_bn
        rows = self._exchange(own)
        rows.setdefault("image_BD", rows["image_Bd"])
        if features.text is not None:
            text = projected.get("text_BD", projected["text_Bd"])
            rows.setdefault("text_BD", rows["text_Bd"])
            if len(text) > count:  # texts without images come last
                rows["extra_text_ED"] = self._gather_compared(text[count:])
        if features.image_tokens is not None and features.text_tokens is not None:
            image_map, text_map = self.parameters.image_map, self.parameters.text_map
            rows["image_tokens_bLD"] = self._project_tokens(features.image_tokens, image_map)
            rows["text_tokens_bLD"] = self._project_tokens(features.text_tokens[:count], text_map)
        return rows

    @torch.no_grad()
    def _teacher_rows(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the teacher's rows by their names in `LossBatch`; none where there is no teacher."""
        teacher_rows = self.teacher.rows(batch)
        if teacher_rows is None:
            return {}
        image, text, extra = teacher_rows
        own = {"teacher_image_BD": project(image.float(), self.space.axes)}
        if text is not None:
            own["teacher_text_BD"] = project(text.float(), self.space.axes)
        rows = self._exchange(own)
        if extra is not None:
            rows["teacher_extra_text_ED"] = self._gather_compared(project(extra.float(), self.space.axes))
        return rows

    def _exchange(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Collect everybody's rows of several kinds in one exchange, as many rows of each kind and process."""
        if self.context.size == 1:
            return own
        together = gather_rows(torch.cat([*own.values()], dim=1))
        widths = [rows.shape[1] for rows in own.values()]
        return dict(zip(own, torch.split(together, widths, dim=1), strict=True))

    def _project(self, features: Features) -> dict[str, Tensor]:
        """Return the unit rows that losses compare, by their names in `LossBatch`."""
        # float32 from here on, whatever the towers ran in: the losses subtract numbers that are nearly equal.
        rows = {"image_Bd": features.image.float()}
        if features.text is not None:
            rows["text_Bd"] = features.text.float()
        image_map = self.parameters.image_map
        text_map = self.parameters.text_map
        if image_map is not None and text_map is not None:
            rows |= {"image_BD": image_map(rows["image_Bd"]), "text_BD": text_map(rows["text_Bd"])}
        if features.masked_image is not None:
            masked = features.masked_image.float()
            rows["masked_image_BD"] = masked if image_map is None else image_map(masked)
        return {name: F.normalize(features, dim=1) for name, features in rows.items()}

    def _project_tokens(self, tokens_bLd: Tensor, learned: nn.Module | None) -> Tensor:
        """Return unit rows of patches or tokens in the shared space, zeros where there is none."""
        rows = tokens_bLd.float()
        exists_bL1 = rows.detach().any(dim=2, keepdim=True)
        if learned is not None:
            rows = learned(rows)
        rows = F.normalize(rows, dim=2) * exists_bL1
        return self._gather_compared(rows.flatten(1)).view(-1, *rows.shape[1:])

    def _gather_compared(self, rows: Tensor) -> Tensor:
        """Collect everybody's rows of what a loss reads of the own samples alone, unless it is of these alone."""
        return rows if self.local_loss else gather_rows(rows)


def _load(loss: LossEntry, settings: DistillSettings) -> Callable[..., Tensor]:
    if loss.name not in settings.own_losses:
        return load_loss(loss.name)
    from clipcid_cli.steps.distill.own_losses import load_own_loss

    return load_own_loss(settings.own_losses[loss.name])
