"""A student in training: its parameters, the losses', the optimiser's, and what a checkpoint holds of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipcid_cli.training.ema import EMA
from clipcid_cli.training.gradients import GradientAverager
from clipcid_cli.training.optimisers import Recipe, backward_order

# CLIP's limit: no logit scale exceeds 100, or falls below 1.
MAX_LOG_SCALE = math.log(100.0)


class TrainState:
    """What a training step changes.

    Attributes:
        log_scales: Logarithms of the logit scales, float32 [] each on the device: the student's own under ``student``, those
            of losses under their names.
        ema: The average of the student's weights; None where none is kept.
        step: Steps done.
    """

    def __init__(
        self,
        module: nn.Module,
        of_losses: nn.Module,
        recipe: Recipe,
        dtype: torch.dtype = torch.float32,
        *,
        ema: float | None = None,
    ) -> None:
        """Make the optimiser.

        Args:
            module: The student.
            of_losses: What the losses themselves learn; its ``log_scales`` are logarithms of logit scales, by loss.
            dtype: Number format of the step's matrix products; float16 scales the loss up before the backward pass.
            ema: Decay of the average of the weights.
        """
        self.module, self.of_losses, self.recipe = module, of_losses, recipe
        student_scale: Any = module.logit_scale
        of_each_loss: Any = of_losses.log_scales
        self.log_scales: dict[str, nn.Parameter] = {"student": student_scale, **of_each_loss}
        self.optimizer = recipe.make_optimizer(module, of_losses.parameters(), dtype)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._scaler = torch.amp.GradScaler(student_scale.device.type, enabled=dtype == torch.float16)
        # The backward pass of the losses, before that of the towers, reaches these.
        at_last = [one for one in (student_scale, *of_losses.parameters()) if one.requires_grad]
        rest = set(self.parameters) - set(at_last)
        towers = [[parameter for parameter in tower if parameter in rest] for tower in backward_order(module)]
        self.averager = GradientAverager([*towers, at_last])
        self.ema = None if ema is None else EMA(module, ema)
        self.step = 0

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped

    def clip_grad_norm(self) -> Tensor:
        """Scale the gradient down to the recipe's largest norm, and return the norm it had, float32 [] on the device."""
        self._scaler.unscale_(self.optimizer)
        limit = math.inf if self.recipe.max_norm is None else self.recipe.max_norm
        return nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)

    @property
    def may_overflow(self) -> bool:
        """Whether an infinite gradient may be due to the loss scale: the update is then skipped and the scale lowered."""
        return self._scaler.is_enabled() and self._scaler.get_scale() > 1.0

    def update(self) -> float:
        """Make one optimiser step with the current gradients, clear them, and return the learning rate used."""
        lr = self.recipe.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for log_scale in self.log_scales.values():
                log_scale.clamp_(0, MAX_LOG_SCALE)
        if self.ema is not None:
            self.ema.update()
        self.step += 1
        return lr

    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint needs; randomness is derived from the step, so there is no generator's state."""
        return {
            "step": self.step,
            "module": self.module.state_dict(),
            "of_losses": self.of_losses.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            **({} if self.ema is None else {"ema": self.ema.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.of_losses.load_state_dict(state["of_losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]
