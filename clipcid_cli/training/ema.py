"""The average of a student's weights over its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
        """Take in the weights after an optimiser step."""
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
        """Return what a checkpoint needs."""
        return {"step": self._step, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._step = state["step"]
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])
