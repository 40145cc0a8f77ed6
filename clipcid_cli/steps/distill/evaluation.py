"""What a student in training is measured on: retrieval on the held-out part, and data sets the user named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from clipcid_cli.formats.results.run_folder import AVERAGED
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.steps.distill.held_out import HeldOut
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.student import batch_norms
from clipcid_cli.training.train_state import TrainState

if TYPE_CHECKING:
    from clipcid_cli.steps.distill.held_out_images import HeldOutImages
    from clipcid_cli.steps.distill.named_data import NamedData


class Evaluation:
    """The measurements of a run, in full precision."""

    def __init__(self, inputs: Inputs, student: ClipModel, named: NamedData | None, context: DistContext) -> None:
        self.held_out: HeldOut | None = None  # on the first process; None when there are too few samples
        self.held_out_images: HeldOutImages | None = None  # likewise, of images that need no captions
        self._student = student
        self._named = named
        self._context = context

        def read() -> bool:
            self.held_out = HeldOut.read(inputs, student)
            if self.held_out is None and inputs.settings.keeps_text_tower:
                from clipcid_cli.steps.distill.held_out_images import HeldOutImages

                self.held_out_images = HeldOutImages.read(inputs, student)
            return self.held_out is not None or self.held_out_images is not None

        self.has_data = context.on_rank0(read) or named is not None

    @property
    def chance(self) -> dict[str, float]:
        """What a guess scores on the held-out part, by metric; empty where there is too little of it."""
        measured = self.held_out or self.held_out_images
        return {} if measured is None else measured.chance

    def measure(self, state: TrainState) -> dict[str, float]:
        """Measure the student as it is, and with its averaged weights under ``ema/…``; call it on every process.

        The metrics are whole on the first process.
        """
        metrics = self._measure()
        if state.ema is None:
            return metrics
        averaged = metrics  # before the first step
        if state.step:
            with state.ema.swapped_in():
                averaged = self._measure()
        return metrics | {f"{AVERAGED}{name}": value for name, value in averaged.items()}

    def _measure(self) -> dict[str, float]:
        context = self._context
        student = self._student
        student.module.eval()
        share_statistics(student.module, context)
        metrics: dict[str, float] = {}
        if self.held_out is not None:
            metrics |= self.held_out.measure(self.held_out.encode(), context.device)
        if self.held_out_images is not None:
            metrics |= self.held_out_images.measure(context.device)
        if self._named is not None:
            metrics |= self._named.measure(student, context)
        return metrics


def share_statistics(module: nn.Module, context: DistContext) -> None:
    """Give every process the first one's running statistics of batch normalisation, which are those that are written.

    In training each process gathers those of its own rows, and reads none.
    """
    buffers = [buffer for layer in batch_norms(module) for buffer in layer.buffers()]
    if context.size == 1 or not buffers:
        return
    first = context.broadcast([buffer.cpu() for buffer in buffers] if context.is_main else [])
    for buffer, value in zip(buffers, first, strict=True):
        buffer.copy_(value)
