"""A student in training: its parameters, the optimiser, the average of its weights, what a checkpoint holds of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipcid_cli.training.gradients import GradientAverager, backward_order
from clipcid_cli.training.optimisers import Recipe

# CLIP's limit: no logit scale exceeds 100, or falls below 1.
MAX_LOG_SCALE = math.log(100.0)


class TrainState:
    """What a training step changes."""

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
            of_losses: What the losses themselves learn; its ``log_scales`` are logarithms of logit scales, by loss.
            dtype: Of the step's matrix products; float16 scales the loss up before the backward pass.
            ema: Decay of the average of the weights.
        """
        self.module = module
        self.of_losses = of_losses
        self.recipe = recipe
        student_scale: Any = module.logit_scale
        of_each_loss: Any = of_losses.log_scales
        # Logarithms of the logit scales, float32 [] each on the device: the student's own under ``student``, those of
        # losses under their names.
        self.log_scales: dict[str, nn.Parameter] = {"student": student_scale, **of_each_loss}
        # The student's logit bias, float32 []; None where it has none.
        self.bias: nn.Parameter | None = getattr(module, "logit_bias", None)
        self.optimizer = recipe.make_optimizer(module, of_losses.parameters(), dtype)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._scaler = torch.amp.GradScaler(student_scale.device.type, enabled=dtype == torch.float16)
        # The backward pass of the losses, before that of the towers, reaches these.
        of_student = [student_scale] if self.bias is None else [student_scale, self.bias]
        at_last = [one for one in (*of_student, *of_losses.parameters()) if one.requires_grad]
        rest = set(self.parameters) - set(at_last)
        towers = [[parameter for parameter in tower if parameter in rest] for tower in backward_order(module)]
        self.averager = GradientAverager([*towers, at_last])
        # The average of the student's weights; None where none is kept.
        self.ema = None if ema is None else EMA(module, ema)
        self.step = 0  # steps done

    def backward(self, loss: Tensor) -> None:
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
                if log_scale.requires_grad:  # one that is kept may be larger: SigLIP's is 118
                    log_scale.clamp_(0, MAX_LOG_SCALE)
        if self.ema is not None:
            self.ema.update()
        self.step += 1
        return lr

    @torch.no_grad()
    def checksum(self) -> int:
        """Return a number of all bits of the parameters, which processes with the same student have in common."""
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = [value.view(words[value.element_size()]).sum(dtype=torch.int64) for value in self.parameters]
        return hash(tuple(torch.stack(sums).tolist()))

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
        self.module.load_state_dict(state["module"])
        self.of_losses.load_state_dict(state["of_losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]


def count_checkpoint_bytes(module: nn.Module, recipe: Recipe, *, ema: bool) -> int:
    """Return the bytes of a student's checkpoint before its training has begun, without what losses learn."""
    weights = sum(int(value.nbytes) for value in module.state_dict().values())
    return weights + recipe.moment_bytes(module) + (count_trained_bytes(module) if ema else 0)


def count_trained_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters that are trained, as many as their gradients take."""
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


class EMA:
    """An exponential moving average of a student's weights, beside the student.

    After step n = 1, 2, … with weights θ_n: ē_n = d_n · ē_{n−1} + (1 − d_n) · θ_n, d_n = min(decay, (1 + n) / (10 + n)),
    ē_0 = θ_0. The smaller d_n of the first steps forget the initial weights soon; timm's averages warm up by another rule.

    Averaged are the trained parameters, and the buffers of floating-point numbers that a checkpoint holds (statistics of
    batch normalisation). What is frozen, and counts, are the student's. The average of clamped logit scales is within their
    limits. It takes 4 bytes a trained parameter, and a step one further operator. A step that float16 leaves out counts.

    Source: TensorFlow, tf.train.ExponentialMovingAverage with ``num_updates``.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        kept = module.state_dict().keys()
        parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        buffers = {name: value for name, value in module.named_buffers() if name in kept and value.is_floating_point()}
        self._weights: dict[str, Tensor] = parameters | buffers
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._step = 0

    @torch.no_grad()
    def update(self) -> None:
        self._step += 1
        fraction = 1 - min(self._decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(list(self._averages.values()), list(self._weights.values()), fraction)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the student the averaged weights for a while, without copying any; not for training."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._weights.items():
            average = self._averages[name]
            weight.data, average.data = average.data, weight.data

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])
