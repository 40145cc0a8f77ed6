"""The numbers of a training run, decided before anything is written."""

from __future__ import annotations

import dataclasses

from clipcid_cli.algorithms.losses.learning_rate import default_rate
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.pipeline import default_workers
from clipcid_cli.runtime.sample_order import SHARDS_MIXED
from clipcid_cli.runtime.training.trainer import OptimiserPlan
from clipcid_cli.steps.distill.inputs import TrainingInputs
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings

DEFAULT_EPOCHS = 32
# Samples of a batch by default: at least so many (fewer if the data has fewer), and on GPUs up to so many for each as long
# as that leaves so many steps.
_SMALLEST_BATCH = 256
_LARGEST_BATCH_PER_GPU = 512
_ENOUGH_STEPS = 20_000

# The log has at most about this many lines, whatever the length of the run.
_MAX_LOG_LINES = 5_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        optimiser: How parameters are updated, for how many steps.
        batch_size: Samples of a global batch.
        extra_texts: Further texts of a step, over all processes.
        workers: Processes that prepare batches, for each training process.
    """

    optimiser: OptimiserPlan
    batch_size: int
    extra_texts: int
    workers: int
    eval_every: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps of a run, and how many lie between evaluations and between checkpoints."""

    steps: int
    eval_every: int
    checkpoint_every: int

    @property
    def log_every(self) -> int:
        """Steps between lines of the training log."""
        return max(1, self.steps // _MAX_LOG_LINES)

    def due_after(self, step: int) -> tuple[bool, bool, bool]:
        """Tell whether a line of the log, an evaluation and a checkpoint are due after `step` steps; all are at the end."""
        logs, evaluates, saves = (
            step % every == 0 or step == self.steps
            for every in (self.log_every, self.eval_every, self.checkpoint_every)
        )
        return logs, evaluates, saves


def default_batch_size(settings: DistillSettings, samples: int, machine: Machine) -> int:
    """Choose a batch size: the largest power of two that leaves enough steps, within the bounds; it divides evenly.

    Args:
        samples: Number of samples to train on.
    """
    size = _SMALLEST_BATCH
    if machine.device.type == "cuda" and settings.steps is None:
        shown = (settings.epochs or DEFAULT_EPOCHS) * samples
        while 2 * size <= min(_LARGEST_BATCH_PER_GPU * machine.size, shown // _ENOUGH_STEPS):
            size *= 2
    divisor = machine.size * settings.accum_freq
    return max(divisor, min(size, samples) // divisor * divisor)


def plan_run(
    settings: DistillSettings, inputs: TrainingInputs, student_width: int, machine: Machine, reporter: Reporter
) -> Plan:
    """Decide batch size, number of steps, warm-up and learning rate.

    Raises:
        UsageError: when the batch does not divide among the processes.
        ClipcidError: when there are fewer training samples than a batch has.
    """
    samples = inputs.training.total
    divisor = machine.size * settings.accum_freq
    batch_size = settings.batch_size or default_batch_size(settings, samples, machine)
    if batch_size % divisor:
        raise UsageError(
            f"--batch-size {batch_size} does not divide into {machine.size} x {settings.accum_freq} equal parts "
            "(processes x --accum-freq).",
            f"Use a multiple of {divisor}.",
        )
    extra_texts = 0 if inputs.extra_texts is None else inputs.extra_texts.number_at(batch_size)
    if extra_texts % machine.size:
        raise UsageError(
            f"--extra-texts {extra_texts} does not divide among {machine.size} processes.",
            f"Use a multiple of {machine.size}.",
        )
    if samples < batch_size:
        lower = "Use fewer processes or a lower --accum-freq" if samples < divisor > 1 else "Lower --batch-size"
        raise ClipcidError(
            f"There are {samples:,} samples to train on, fewer than one batch of {batch_size:,}.",
            f"{lower}, or give more data." if samples else "Give more data.",
        )
    epochs = settings.epochs or DEFAULT_EPOCHS
    steps = settings.steps or max(1, epochs * samples // batch_size)
    warmup = min(steps // 10, 2_000) if settings.warmup is None else settings.warmup
    if warmup > steps:
        raise UsageError(f"--warmup {warmup:,} exceeds the {steps:,} steps of the run.", "Give fewer warm-up steps.")
    reporter.note(
        f"{samples:,} samples, {steps:,} steps of {batch_size:,}: {steps * batch_size / samples:.1f} epochs, "
        f"{warmup:,} steps of warm-up; {inputs.held_out.total:,} more samples are held out.\n"
        f"{_describe_shuffle(len(inputs.training.sizes))}"
    )
    if settings.optimizer == "muon":
        reporter.note("Optimizer: Muon for the layers of the towers, AdamW for all else.")
    lr = settings.lr
    if lr is None:
        rate = default_rate(settings.losses(), settings.optimizer, batch_size, student_width)
        reporter.note(f"Learning rate: {rate.value:g} ({rate.reason}).")
        lr = rate.value
    optimiser = OptimiserPlan(
        optimizer=settings.optimizer,
        lr=lr,
        weight_decay=settings.wd,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        warmup=warmup,
        steps=steps,
        max_norm=settings.grad_clip_norm or None,
    )
    workers = default_workers(machine.device) if settings.workers is None else settings.workers
    if extra_texts:
        reporter.note(f"Each step the text tower sees {extra_texts:,} further texts.")
    return Plan(optimiser, batch_size, extra_texts, workers, settings.eval_every or max(1, steps // 10))


def _describe_shuffle(shards: int) -> str:
    if shards <= SHARDS_MIXED:
        return "Shuffle: uniform over all samples, in each epoch."
    return (
        f"Shuffle: {shards:,} shards in a new order each epoch, samples uniformly among {SHARDS_MIXED} shards at a time "
        f"({SHARDS_MIXED / shards:.1%} of the data)."
    )


def default_name(settings: DistillSettings, student: ClipModel, inputs: TrainingInputs) -> str:
    """Name a run after its student, preset and seed, with `all` where there is no keep list."""
    parts = [student.info.slug, settings.chosen_preset, f"s{settings.seed}"]
    return "-".join(parts if inputs.keep_list is not None else [*parts, "all"])
