"""What a student is trained for: the weighted sum of a run's losses over one global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.registry import LOSSES, load_loss
from clipcid_cli.runtime.gradients import gather_rows, sum_values
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.training import LossParameters
from clipcid_cli.steps.distill.batches import TrainingBatch

if TYPE_CHECKING:
    from clipcid_cli.steps.distill.teacher_space import Teacher


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
        targets: Teacher | None,
        machine: Machine,
        *,
        local: bool = False,
    ) -> None:
        """Bind the losses.

        Args:
            weights: Factor of each loss by name.
            parameters: The losses' own scales and maps.
            targets: What the teacher said of each sample; None when no loss asks.
            local: Whether each process computes the losses of its own rows only, against everybody's.
        """
        self.weights = dict(weights)
        self._functions = {name: load_loss(name) for name in weights}
        self.parameters = parameters
        self._targets, self._machine = targets, machine
        self._local = local and machine.size > 1

    def __call__(
        self, image_bd: Tensor, text_bd: Tensor, student_scale: Tensor, seen: TrainingBatch, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a step.

        Args:
            image_bd: This process's image features, not normalised, [b, d].
            seen: Its part of the batch, by which the teacher's side is found.
            step: Number of the step; decides the draw of cluster centroids.

        Returns:
            What to find the gradients of: the weighted sum of the losses of the global batch, or (`local`) of this
            process's rows, times the number of processes. And each loss by name without its weight; `values` makes them
            the global batch's.
        """
        machine, count = self._machine, len(image_bd)
        # float32 from here on, whatever the towers ran in: the losses subtract numbers that are nearly equal.
        image, text = F.normalize(image_bd.float(), dim=1), F.normalize(text_bd.float(), dim=1)
        parts = [image, text]
        if self.parameters.image_map is not None and self.parameters.text_map is not None:
            parts.append(F.normalize(self.parameters.image_map(image_bd.float()), dim=1))
            parts.append(F.normalize(self.parameters.text_map(text_bd.float()), dim=1))
        widths = [part.shape[1] for part in parts]
        together = gather_rows(torch.cat(parts, dim=1), machine.size, shared=self._local)
        gathered = torch.split(together, widths, dim=1)
        start = machine.rank * count if self._local else 0
        batch = LossBatch(
            image_Bd=gathered[0],
            text_Bd=gathered[1],
            student_scale=student_scale,
            image_BD=gathered[-2],
            text_BD=gathered[-1],
            own=slice(start, start + count) if self._local else slice(0, len(together)),
        )
        if self._targets is not None:
            with torch.no_grad():
                batch = self._targets.add_targets(batch, seen, step)
        terms: dict[str, Tensor] = {}
        for name, function in self._functions.items():
            own = LOSSES[name].own_scale
            terms[name] = function(batch, self.parameters.scale(name)) if own else function(batch)
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return total * machine.size if self._local else total, terms

    def values(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Return each loss of the global batch as a number, the same on every process."""
        found = torch.stack([term.detach() for term in terms.values()])
        if self._local:
            found = sum_values(found, self._machine.size)
        return dict(zip(terms, found.tolist(), strict=True))
