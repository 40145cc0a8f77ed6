"""How parameters are updated: the learning rate of each step, what is decayed, AdamW or Muon."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from clipcid_cli.training.muon import Muon, matrices_of


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How parameters are updated: by ``muon`` the matrices within the towers and by AdamW all else, or all by ``adamw``.

    Attributes:
        steps: Steps of the whole run.
        max_norm: Largest norm of the gradient; None for no limit.
    """

    optimizer: str
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    warmup: int
    steps: int
    max_norm: float | None

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine to 0 after the last step.

        Source: mlfoundations/open_clip, open_clip_train/scheduler.py, cosine_lr.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) * self.lr

    def make_optimizer(
        self, module: nn.Module, of_losses: Iterable[nn.Parameter], dtype: torch.dtype
    ) -> torch.optim.AdamW:
        """Make AdamW, or Muon whose products are in `dtype`; vectors, scalars and the losses' parameters are not decayed.

        Norms, biases, class tokens' vectors and logit scales all have fewer than two dimensions.

        Source: mlfoundations/open_clip, open_clip_train/main.py, exclude rule; ours also covers the losses' parameters.
        """
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        muons = matrices_of(module) if self.optimizer == "muon" else set[str]()
        decayed = [parameter for name, parameter in trained.items() if parameter.ndim >= 2 and name not in muons]
        plain = [parameter for parameter in trained.values() if parameter.ndim < 2] + list(of_losses)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        matrices = [parameter for name, parameter in trained.items() if name in muons]
        groups = [group | {"matrices": False} for group in groups]
        groups.append({"params": matrices, "weight_decay": self.weight_decay, "matrices": True})
        return Muon(groups, self.lr, self.betas, self.eps, dtype)


def backward_order(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of the text and the image tower, each in the order in which their gradients arrive.

    Texts are encoded last, so their tower comes first. Layers arrive from the last to the first; embeddings of tokens and
    positions at the very end, wherever a model defines them.
    """
    towers: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    stems: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in reversed(list(module.named_parameters())):
        (stems if "embed" in name else towers)[name.startswith("visual.")].append(parameter)
    return towers[0] + stems[0], towers[1] + stems[1]
