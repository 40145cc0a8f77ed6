"""What a student is trained for: the weighted sum of a run's losses over one global batch, with the teacher's part in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.registry import LOSSES, load_loss
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.grad_cache import Features
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.training.gradients import gather_rows, sum_values
from clipcid_cli.runtime.training.trainer import LossParameters
from clipcid_cli.steps.distill.batches import TrainingBatch
from clipcid_cli.steps.distill.teacher import Teacher
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings


class Objective:
    """The losses of a run.

    Attributes:
        weights: Factor of each loss by name.
        parameters: What the losses themselves learn.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        parameters: LossParameters,
        teacher: Teacher | None,
        machine: Machine,
        *,
        local: bool = False,
    ) -> None:
        """Bind the losses.

        Args:
            weights: Factor of each loss by name.
            parameters: The losses' own scales and maps.
            teacher: None where no loss needs one.
            local: Whether each process computes the losses of its own rows only, against everybody's.
        """
        self.weights = dict(weights)
        self._functions = {name: load_loss(name) for name in weights}
        self.parameters = parameters
        self._teacher, self._machine = teacher, machine
        self._local = local and machine.size > 1

    def __call__(
        self, features: Features, student_scale: Tensor, batch: TrainingBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a step.

        Args:
            features: Of this process's part of the batch.
            batch: Its part of the batch, prepared.

        Returns:
            What the gradients are of: the weighted sum of the losses of the global batch, or (with `local` losses) of this
            process's rows, times the number of processes. And each loss by name without its weight; `values` makes them
            the global batch's.
        """
        machine, count, num_extra = self._machine, len(features.image), len(features.text) - len(features.image)
        own = self._rows(features)
        extra = own.get("text_BD", own["text_Bd"])[count:] if num_extra else None  # texts without images come last
        rows = self._gather({name: found[:count] for name, found in own.items()} if num_extra else own)
        start = machine.rank * count if self._local else 0
        everything = LossBatch(
            image_Bd=rows["image_Bd"],
            text_Bd=rows["text_Bd"],
            student_scale=student_scale,
            image_BD=rows.get("image_BD", rows["image_Bd"]),
            text_BD=rows.get("text_BD", rows["text_Bd"]),
            masked_image_BD=rows.get("masked_image_BD"),
            image_tokens_bLD=self._tokens(features.image_tokens, self.parameters.image_map, count),
            text_tokens_bLD=self._tokens(features.text_tokens, self.parameters.text_map, count),
            fusion=self.parameters.fusion_pair(),
            extra_text_ED=extra if extra is None or self._local else gather_rows(extra, machine.size),
            num_extra=machine.size * num_extra,
            own=slice(start, start + count) if self._local else slice(0, machine.size * count),
        )
        if self._teacher is not None:
            image, text, taught = self._teacher.rows(batch)
            everything = dataclasses.replace(
                everything,
                teacher_image_BD=gather_rows(image, machine.size),
                teacher_text_BD=None if text is None else gather_rows(text, machine.size),
                teacher_scale=self._teacher.scale,
                image_clusters=batch.image_clusters,
                text_clusters=batch.text_clusters,
                teacher_extra_text_ED=taught if taught is None or self._local else gather_rows(taught, machine.size),
            )
        terms: dict[str, Tensor] = {}
        for name, function in self._functions.items():
            own_scale = LOSSES[name].own_scale
            terms[name] = function(everything, self.parameters.scale(name)) if own_scale else function(everything)
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return total * machine.size if self._local else total, terms

    def _rows(self, features: Features) -> dict[str, Tensor]:
        """Return the unit rows that losses compare, by their names in `LossBatch`."""
        # float32 from here on, whatever the towers ran in: the losses subtract numbers that are nearly equal.
        image, text = features.image.float(), features.text.float()
        rows = {"image_Bd": image, "text_Bd": text}
        image_map, text_map = self.parameters.image_map, self.parameters.text_map
        if image_map is not None and text_map is not None:
            rows |= {"image_BD": image_map(image), "text_BD": text_map(text)}
        if features.masked_image is not None:
            masked = features.masked_image.float()
            rows["masked_image_BD"] = masked if image_map is None else image_map(masked)
        return {name: F.normalize(found, dim=1) for name, found in rows.items()}

    def _tokens(self, tokens_bLd: Tensor | None, learned: nn.Module | None, count: int) -> Tensor | None:
        """Return unit rows of patches or tokens in the shared space, and zeros where there is none, for the own rows."""
        if tokens_bLd is None:
            return None
        found = tokens_bLd[:count].float()
        exists_bL1 = found.detach().any(dim=2, keepdim=True)
        found = F.normalize(found if learned is None else learned(found), dim=2) * exists_bL1
        if self._local:
            return found
        return gather_rows(found.flatten(1), self._machine.size).view(-1, *found.shape[1:])

    def _gather(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Collect everybody's rows, all in one exchange."""
        widths = [found.shape[1] for found in rows.values()]
        together = gather_rows(torch.cat(list(rows.values()), dim=1), self._machine.size, shared=self._local)
        return dict(zip(rows, torch.split(together, widths, dim=1), strict=True))

    def values(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the losses of the global batch in order, float32 [len(terms)] on the device, the same on every process."""
        found = torch.stack([term.detach() for term in terms.values()])
        return sum_values(found, self._machine.size) if self._local else found


def make_objective(
    settings: DistillSettings, student_width: int, teacher: Teacher | None, machine: Machine, reporter: Reporter
) -> Objective:
    """Make the losses that the settings ask for, with their own parameters."""
    width = student_width if teacher is None else teacher.space.width
    weights = {name: weight.at(width) for name, weight in settings.losses().items()}
    reporter.note("Loss: " + " + ".join(f"{value:g}·{name}" for name, value in weights.items()) + ".")
    parameters = LossParameters(
        [name for name in weights if LOSSES[name].own_scale],
        student_width,
        teacher.space.width if teacher is not None and teacher.space.is_learned else None,
        derive_seed("loss parameters", settings.seed),
        fused_width=width if any(LOSSES[name].fuses for name in weights) else None,
    )
    return Objective(weights, parameters.to(machine.device), teacher, machine, local=settings.local_loss)
