"""Training: optimiser, schedule, the losses' own parameters, and what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipcid_cli.runtime.training.muon import Muon, matrices_of
from clipcid_cli.runtime.training.weight_average import WeightAverage

# CLIP's limits: logit scales start at 1/0.07 and never exceed 100.
INITIAL_SCALE = 1 / 0.07
MAX_LOG_SCALE = math.log(100.0)


@dataclasses.dataclass(frozen=True)
class OptimiserPlan:
    """How parameters are updated.

    Attributes:
        optimizer: ``muon`` for the matrices within the towers and AdamW for all else, or ``adamw`` for all.
        betas: AdamW's decay rates of mean and square.
        eps: AdamW's guard against division by zero.
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

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine to 0 after the last step.

        Source: mlfoundations/open_clip, open_clip_train/scheduler.py, cosine_lr.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) * self.lr


class LossParameters(nn.Module):
    """What the losses themselves learn: logarithms of logit scales, and linear layers.

    Attributes:
        image_map: Layer from the student's image features into the teacher's space; None where that is not learned.
        text_map: The same for captions.
        fusion: Layers that join the features of student and teacher, for images and for captions; None where no loss has
            them.
    """

    def __init__(
        self,
        scales: Iterable[str],
        student_width: int,
        projected_width: int | None,
        seed: int,
        *,
        fused_width: int | None = None,
    ) -> None:
        """Make them.

        Args:
            scales: Names of the losses that own a scale.
            projected_width: D when a linear layer per tower maps the student's features there, else None.
            seed: Decides the layers' first weights.
            fused_width: Width of the teacher's features where layers join them with the student's, to the student's width.
        """
        super().__init__()
        self.log_scales = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(math.log(INITIAL_SCALE))) for name in scales}
        )
        self.image_map: nn.Linear | None = None
        self.text_map: nn.Linear | None = None
        self.fusion: nn.ModuleList | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if projected_width is not None:
                self.image_map = nn.Linear(student_width, projected_width)
                self.text_map = nn.Linear(student_width, projected_width)
            if fused_width is not None:
                self.fusion = nn.ModuleList(nn.Linear(student_width + fused_width, student_width) for _ in range(2))

    def scale(self, name: str) -> Tensor:
        """Return σ of a loss, a scalar."""
        log_scale: Tensor = self.log_scales[name]
        return log_scale.exp()

    def fusion_pair(self) -> tuple[nn.Module, nn.Module] | None:
        """Return the layers of images and of captions."""
        return None if self.fusion is None else (self.fusion[0], self.fusion[1])


def make_optimizer(
    module: nn.Module, loss_parameters: LossParameters, plan: OptimiserPlan, dtype: torch.dtype
) -> torch.optim.AdamW:
    """Make AdamW or Muon, whose products are in `dtype`; vectors, scalars and the losses' own parameters are not decayed.

    Norms, biases, class tokens' vectors and logit scales all have fewer than two dimensions.

    Source: mlfoundations/open_clip, open_clip_train/main.py, exclude rule; ours also covers the losses' parameters.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    muons = matrices_of(module) if plan.optimizer == "muon" else set[str]()
    decayed = [parameter for name, parameter in trained.items() if parameter.ndim >= 2 and name not in muons]
    plain = [parameter for parameter in trained.values() if parameter.ndim < 2] + list(loss_parameters.parameters())
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, eps=plan.eps, fused=True)
    matrices = [parameter for name, parameter in trained.items() if name in muons]
    groups = [group | {"matrices": False} for group in groups]
    groups.append({"params": matrices, "weight_decay": plan.weight_decay, "matrices": True})
    return Muon(groups, plan.lr, plan.betas, plan.eps, dtype)


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


class Trainer:
    """A student in training: its parameters, the losses' and the optimiser's, and the count of steps done.

    Attributes:
        of_towers: Parameters that features depend on: the text tower's and the image tower's, each about in the order in
            which a backward pass reaches them.
        of_losses: Parameters that only the losses use: logit scales (the student's too) and maps into the shared space.
        average: The average of the student's weights; None where none is kept.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_parameters: LossParameters,
        plan: OptimiserPlan,
        dtype: torch.dtype = torch.float32,
        *,
        ema: float | None = None,
    ) -> None:
        """Make the optimiser.

        Args:
            dtype: Number format of the step's matrix products. With float16 the loss is scaled up before the backward pass.
            ema: Decay of the average of the weights; None keeps none.
        """
        self.module = module
        self.loss_parameters = loss_parameters
        self.plan = plan
        self.optimizer = make_optimizer(module, loss_parameters, plan, dtype)
        self._device = next(module.parameters()).device
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=dtype == torch.float16)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        of_losses = {id(parameter) for parameter in (*loss_parameters.parameters(), module.logit_scale)}
        trained = {id(parameter) for parameter in self.parameters} - of_losses
        self.of_towers = [
            [parameter for parameter in tower if id(parameter) in trained] for tower in backward_order(module)
        ]
        self.of_losses = [parameter for parameter in self.parameters if id(parameter) in of_losses]
        self.average = None if ema is None else WeightAverage(module, ema)
        self.step = 0

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss, scaled up where that is needed."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped

    def limit_gradient(self) -> Tensor:
        """Scale the gradient down to the plan's largest norm, and return the norm it had, float32 [] on the device."""
        self._scaler.unscale_(self.optimizer)
        limit = math.inf if self.plan.max_norm is None else self.plan.max_norm
        return nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)

    @property
    def may_overflow(self) -> bool:
        """Whether an infinite gradient may be due to the loss scale: the update is then skipped and the scale lowered."""
        return self._scaler.is_enabled() and self._scaler.get_scale() > 1.0

    def update(self) -> float:
        """Make one optimiser step with the current gradients, clear them, and return the learning rate used."""
        rate = self.plan.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for log_scale in self.log_scales().values():
                log_scale.clamp_(0, MAX_LOG_SCALE)
        if self.average is not None:
            self.average.update()
        self.step += 1
        return rate

    def state(self) -> dict[str, Any]:
        """Return all that a checkpoint needs; randomness is derived from the step, so there is no generator's state."""
        return {
            "step": self.step,
            "module": self.module.state_dict(),
            "loss_parameters": self.loss_parameters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            **({} if self.average is None else {"average": self.average.state()}),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.module.load_state_dict(state["module"])
        self.loss_parameters.load_state_dict(state["loss_parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(state["average"])
        self.step = state["step"]

    def log_scales(self) -> dict[str, Tensor]:
        """Return the logarithms of the logit scales, float32 [] each on the device, the student's own under ``student``."""
        own: Any = self.module.logit_scale
        return {"student": own, **dict(self.loss_parameters.log_scales.items())}
