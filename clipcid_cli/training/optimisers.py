"""How parameters are updated: the learning rate of each step, what is decayed, AdamW or Muon.

Muon moves a matrix by its momentum with all singular values made about equal, so that no direction is left behind. What
differs from `torch.optim.Muon`: matrices of one shape are taken together, and products have the number format of training.
For a student of 12 small matrices a step took 3.4 ms instead of 10 (AMD EPYC, one thread), and on a GPU 12 layers need the
kernels of one.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), Nesterov momentum and
coefficients; J. Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982, for the update's size, at which
AdamW's learning rate and weight decay serve.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
# Of the quintic x → ax + bx³ + cx⁵: five rounds bring singular values from 0.01…1 into about 0.7…1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
# An update's root mean square is that of AdamW's, about 0.2, times the learning rate.
_UPDATE_SIZE = 0.2


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring all singular values of matrices [n, a, b], a ≤ b, near 1, by products in `dtype`; a zero matrix stays one."""
    first, third, fifth = _COEFFICIENTS
    scaled: Tensor = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(dtype)
    for _ in range(_ROUNDS):
        gram = scaled @ scaled.mT
        quartic = torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth)
        scaled = torch.baddbmm(scaled, quartic, scaled, beta=first)
    return scaled.to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Muon for matrices and AdamW for all else, as one optimiser.

    Groups are AdamW's; those with ``matrices`` true hold two-dimensional parameters and are updated by Muon.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, dtype: torch.dtype
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        # The gradient scaler asks itself whether to skip an update: half of one must not be made.
        self._step_supports_amp_scaling = False
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; the matrices' gradients are gone afterwards."""
        for group in self.param_groups:
            if group["matrices"]:
                self._move(group)
        return super().step(closure)

    def _move(self, group: dict[str, Any]) -> None:
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        if not matrices:
            return
        gradients: list[Tensor] = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            # AdamW passes over what has no gradient.
            matrix.grad = None
            if not self.state[matrix]:
                # AdamW's loading asks every parameter's state for a step.
                self.state[matrix] = {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        torch._foreach_lerp_(gradients, momenta, _MOMENTUM)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        for shape in dict.fromkeys(matrix.shape for matrix in matrices):
            alike = [matrix for matrix in matrices if matrix.shape == shape]
            wide = torch.stack([gradient for gradient in gradients if gradient.shape == shape])
            if wide.shape[1] > wide.shape[2]:
                wide = wide.mT
            update = orthogonalise(wide, self._dtype)
            size = _UPDATE_SIZE * math.sqrt(wide.shape[2])
            changes = update if update.shape[1:] == shape else update.mT
            torch._foreach_add_(alike, list(changes.unbind()), alpha=-group["lr"] * size)


def matrices_of(module: nn.Module) -> set[str]:
    """Name the parameters that Muon updates: the weights of linear layers and of attention's first projection.

    Tables are none of them, even where a layer shares one: of tokens, positions, relative positions, learned queries.
    """
    tables = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
    linear = {part.weight for part in module.modules() if isinstance(part, nn.Linear)} - tables
    return {
        name for name, parameter in module.named_parameters() if parameter in linear or name.endswith("in_proj_weight")
    }


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How parameters are updated: by ``muon`` the matrices within the towers and by AdamW all else, or all by ``adamw``."""

    optimizer: str
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    warmup: int
    steps: int  # steps of the whole run
    max_norm: float | None  # largest norm of the gradient; None for no limit

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine to 0 after the last step.

        Source: mlfoundations/open_clip, open_clip_train/scheduler.py, cosine_lr.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) * self.lr

    def moment_bytes(self, module: nn.Module) -> int:
        """Return the bytes that the optimiser keeps of a module's trained parameters: Muon one number of each, AdamW two."""
        muons = matrices_of(module) if self.optimizer == "muon" else set[str]()
        trained = {name: parameter.nbytes for name, parameter in module.named_parameters() if parameter.requires_grad}
        return sum(size if name in muons else 2 * size for name, size in trained.items())

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
