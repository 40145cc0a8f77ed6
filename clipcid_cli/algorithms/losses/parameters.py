"""What the losses themselves learn: logit scales, biases, and linear layers.

Shape legend: d student width, D width of the shared space.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.algorithms.losses.shared_space import SharedSpace


class LossParameters(nn.Module):
    """The parameters of a run's losses, as `LossEntry` declares them.

    Attributes:
        log_scales: Logarithm of its logit scale by loss.
        biases: Its bias by loss.
        image_map: Layer from the student's image features into the shared space, d → D; None where that is not learned.
        text_map: The same for captions.
    """

    def __init__(self, names: Iterable[str], student_width: int, space: SharedSpace, seed: int) -> None:
        """Make those of the losses `names`; the seed decides the layers' first weights."""
        super().__init__()
        entries = [LOSSES[name] for name in names]
        self.log_scales = nn.ParameterDict(
            {entry.name: torch.tensor(math.log(entry.scale)) for entry in entries if entry.scale is not None}
        )
        self.biases = nn.ParameterDict(
            {entry.name: torch.tensor(entry.bias) for entry in entries if entry.bias is not None}
        )
        self.image_map: nn.Linear | None = None
        self.text_map: nn.Linear | None = None
        self.fusions = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if space.is_learned:
                self.image_map = nn.Linear(student_width, space.width)
                self.text_map = nn.Linear(student_width, space.width)
            for entry in entries:
                if entry.fuses:
                    widths = student_width + space.width, student_width
                    self.fusions[entry.name] = nn.ModuleList([nn.Linear(*widths), nn.Linear(*widths)])

    def of(self, name: str) -> dict[str, Any]:
        """Return the arguments that a loss is called with beside its batch."""
        scales: dict[str, Any] = {"scale": self.log_scales[name].exp()} if name in self.log_scales else {}
        others: dict[str, Any] = {"bias": self.biases, "fusion": self.fusions}
        return scales | {kind: learned[name] for kind, learned in others.items() if name in learned}
