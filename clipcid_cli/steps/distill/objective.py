"""What a student is trained for: the weighted sum of a run's losses over one global batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipcid_cli.algorithms.losses.batch import LossBatch, rows_between
from clipcid_cli.algorithms.losses.registry import load_loss
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace, project
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.own_losses import load_own_loss
from clipcid_cli.steps.distill.teachers import Teacher
from clipcid_cli.steps.distill.training_batch import TrainingBatch
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
    functions: dict[str, Callable[..., Tensor]]  # by the same names
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
        weights = {loss.name: weight.at(space.width) for loss, weight in losses.items()}
        why = "" if losses == settings.losses else " (the teacher is near chance)"
        reporting.note("Loss: " + " + ".join(f"{value:g}·{name}" for name, value in weights.items()) + f"{why}.")
        seed = derive_seed("loss parameters", settings.seed)
        parameters = LossParameters(losses, student_width, space, seed).to(context.device)
        local_loss = settings.local_loss and context.size > 1
        own = {name: load_own_loss(file) for name, file in settings.own_losses.items()}
        functions = {name: own[name] if name in own else load_loss(name) for name in weights}
        return cls(weights, functions, parameters, inputs.teacher, space, context, settings.affinity_scale, local_loss)

    def gather(
        self, features: Features, student_scale: Tensor, student_bias: Tensor | None, batch: TrainingBatch
    ) -> LossBatch:
        """Collect all processes' features, and the teacher's, as unit rows of the shared space; call it on every process."""
        size = self.context.size
        count = len(features.image)
        start = self.context.rank * count if self.local_loss else 0
        own = self._project(features)
        num_extra = 0 if features.text is None else len(features.text) - count  # texts without images come last
        extra = own.get("text_BD", own["text_Bd"])[count:] if num_extra else None
        # All in one exchange.
        together = gather_rows(torch.cat([rows_between(rows, 0, count) for rows in own.values()], dim=1))
        widths = [rows.shape[1] for rows in own.values()]
        rows: dict[str, Any] = dict(zip(own, torch.split(together, widths, dim=1), strict=True))
        if features.text is None:
            rows["text_Bd"] = rows["image_Bd"][:0]
        taught = LossBatch(
            **{"image_BD": rows["image_Bd"], "text_BD": rows["text_Bd"]} | rows,
            trains_text=features.text is not None,
            student_scale=student_scale,
            student_bias=student_bias,
            affinity_scale=self.affinity_scale,
            image_tokens_bLD=self._project_tokens(features.image_tokens, self.parameters.image_map, count),
            text_tokens_bLD=self._project_tokens(features.text_tokens, self.parameters.text_map, count),
            extra_text_ED=self._gather_compared(extra),
            num_extra=size * num_extra,
            own=slice(start, start + count) if self.local_loss else slice(0, size * count),
        )
        teacher_rows = self.teacher.rows(batch)
        if teacher_rows is None:
            return taught
        with torch.no_grad():
            image, text, extra = [
                None if rows is None else project(rows.float(), self.space.axes) for rows in teacher_rows
            ]
            text = None if text is None else gather_rows(text)
            if text is not None and not taught.trains_text:  # the text tower is the teacher's: so are its rows
                taught = dataclasses.replace(taught, text_Bd=text, text_BD=text)
            return dataclasses.replace(
                taught,
                teacher_image_BD=None if image is None else gather_rows(image),
                teacher_text_BD=text,
                teacher_extra_text_ED=self._gather_compared(extra),
                teacher_scale=self.teacher.scale,
                teacher_bias=self.teacher.bias,
                image_clusters=batch.image_clusters,
                text_clusters=batch.text_clusters,
            )

    def compare(self, features: LossBatch) -> Compared:
        """Compute the losses of a step; call it on every process."""
        terms = [function(features, **self.parameters.of(name)) for name, function in self.functions.items()]
        weighted = [weight * term for weight, term in zip(self.weights.values(), terms, strict=True)]
        total = torch.stack(weighted).sum()
        values = torch.stack([term.detach() for term in terms])
        if self.local_loss:
            total = total * self.context.size
            values = self.context.sum_(values)
        return Compared(total, dict(zip(self.weights, values.unbind(), strict=True)))

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

    def _project_tokens(self, tokens_bLd: Tensor | None, learned: nn.Module | None, count: int) -> Tensor | None:
        """Return unit rows of patches or tokens in the shared space, zeros where there is none; none of further texts."""
        if tokens_bLd is None:
            return None
        rows = tokens_bLd[:count].float()
        exists_bL1 = rows.detach().any(dim=2, keepdim=True)
        if learned is not None:
            rows = learned(rows)
        rows = F.normalize(rows, dim=2) * exists_bL1
        gathered = self._gather_compared(rows.flatten(1))
        return None if gathered is None else gathered.view(-1, *rows.shape[1:])

    def _gather_compared(self, rows: Tensor | None) -> Tensor | None:
        """Collect everybody's rows of what a loss reads of the own samples alone, unless it is of these alone."""
        return rows if rows is None or self.local_loss else gather_rows(rows)
