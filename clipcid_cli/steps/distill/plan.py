"""What `distill` will do: the data, the recipe, and the folder of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from clipcid_cli.algorithms.losses.rates import default_rate
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.output import OutputSpec, unfinished
from clipcid_cli.formats.results.run_folder import DistillSidecar, RunFolder
from clipcid_cli.formats.sidecar import Provenance, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.records import hash_preprocess
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.randomness import SHARDS_MIXED
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.inputs import Inputs, find_inputs
from clipcid_cli.steps.distill.memory import fitting_batch
from clipcid_cli.steps.distill.stored import TeacherFolders, validate_teacher_names
from clipcid_cli.steps.distill.student import Student
from clipcid_cli.steps.keep_list import NO_KEEP_LIST
from clipcid_cli.steps.preflight import choose_workers
from clipcid_cli.steps.settings.distill import DEFAULT_EPOCHS, DistillSettings
from clipcid_cli.steps.settings.shared import output_settings
from clipcid_cli.training.optimisers import Recipe

if TYPE_CHECKING:
    from clipcid_cli.steps.distill.named_data import NamedData

# The log has at most about this many lines, whatever the length of the run.
_MAX_LOG_LINES = 5_000


@dataclasses.dataclass(frozen=True)
class DistillPlan:
    """What is trained, on what, and for how long."""

    settings: DistillSettings
    inputs: Inputs
    folder: RunFolder
    named: NamedData | None  # data sets of ``--eval-data``
    recipe: Recipe
    batch_size: int  # over all processes, as `extra_texts`
    extra_texts: int
    workers: int  # for each training process
    log_every: int  # in steps, as what follows
    eval_every: int
    checkpoint_every: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.steps

    @property
    def students(self) -> list[Path]:
        """Folders of the models that the run ends with."""
        return self.folder.students(ema=self.settings.ema is not None)

    def loaded(self, context: DistContext) -> DistillPlan:
        """Load the teacher, where it runs alongside the student; call it on every process."""
        teacher = self.inputs.teacher.loaded(self.settings, context)
        return dataclasses.replace(self, inputs=dataclasses.replace(self.inputs, teacher=teacher))

    def identify(self, student: Student) -> OutputSpec[DistillSidecar]:
        """Say what decides the output, given the student."""
        settings, inputs = self.settings, self.inputs
        identity = output_settings(settings)
        # Data and teacher are inputs, identified by their content, however they were named.
        for name in ("data", "teacher", "epochs", "init_from"):
            del identity[name]
        # What is not used is not recorded: a run that was begun before there were these settings goes on.
        if not settings.keeps_text_tower:
            del identity["text_tower"]
        if not settings.student_caption_key:
            del identity["student_caption_key"]
        info = student.model.info
        clusters = inputs.clusters
        identity |= {
            "preset": settings.name_losses(inputs.losses),
            "precision": student.precision.name,
            "warmup": self.recipe.warmup,
            "lr": self.recipe.lr,
            "losses": {loss.name: dataclasses.asdict(weight) for loss, weight in inputs.losses.items()},
            "student": {
                "config": info.config,
                "weights": info.weights_hash,
                "pixels": hash_preprocess(info.preprocess, fast_decode=settings.fast_decode),
            },
            "batch_size": self.batch_size,
            "extra_texts": self.extra_texts,
            "eval_every": self.eval_every,
            "steps": self.steps,
            "views": "stored" if settings.shows_views else "none",
            "cluster_towers": "both" if clusters is not None and clusters.teach_text else "image",
        }
        if settings.own_losses:  # identified by their sources, wherever the files are
            identity["loss"] = [f"{name}={weight:g}" for name, weight in settings.typed_losses.items()]
            identity["loss_sources"] = {name: file.hash for name, file in settings.own_losses.items()}
        if clusters is not None:
            identity["cluster_temperature"] = clusters.temperatures
        return OutputSpec(
            self.folder.path,
            "distill",
            DistillSidecar,
            settings=identity,
            inputs=inputs.fingerprints + inputs.teacher.describe_weights(),
            overwrite=settings.overwrite,
            elsewhere="--name",
        )


def validate_named(settings: DistillSettings) -> NamedData | None:
    """Look at what can be wrong with named inputs before hours of embedding; return the data sets of ``--eval-data``."""
    if settings.own_losses:
        from clipcid_cli.steps.distill.own_losses import load_own_loss

        for file in settings.own_losses.values():
            load_own_loss(file)
    if settings.needs_teacher:
        validate_teacher_names(settings)
    if settings.keep_list not in (None, NO_KEEP_LIST):
        from clipcid_cli.formats.results.keep_list import read_keep_list

        read_keep_list(Path(settings.keep_list))
    if settings.needs_clusters:
        from clipcid_cli.steps.distill.clusters import validate_named_clusters

        validate_named_clusters(settings)
    if not settings.eval_data:
        return None
    from clipcid_cli.steps.distill.named_data import open_named_data

    return open_named_data(settings)


def make_plan(
    settings: DistillSettings,
    student: Student,
    embeddings: TeacherFolders,
    named: NamedData | None,
    scratch: Path | None,
    context: DistContext,
    memories: Sequence[int | None],
) -> DistillPlan:
    """Plan a run, on the first process; `memories` are those of the processes' GPUs, None of a CPU."""
    inputs = find_inputs(settings, embeddings, scratch)
    settings = inputs.settings
    parts = [student.model.info.slug, settings.name_losses(inputs.losses), f"s{settings.seed}"]
    name = settings.name or "-".join(parts + ["all"] * (inputs.keep_list is None))
    folder = RunFolder(WorkDirectory(settings.work).distill(name))
    memory = min([total for total in memories if total is not None], default=None)
    batch_size = settings.batch_size
    if batch_size is None and memory is not None:
        batch_size = _recorded_batch_size(settings, folder)
    if batch_size is None:
        fitting = None if memory is None else fitting_batch(settings, student, inputs, memory)
        batch_size = settings.default_batch_size(inputs.training.total, context.size, fitting)
    validate_batch_size(settings, batch_size, inputs.training.total, context)
    extra_texts = inputs.teacher.num_extra_texts(batch_size)
    if extra_texts % context.size:
        raise UsageError(
            f"--extra-texts {extra_texts} does not divide among {context.size} processes.",
            f"Use a multiple of {context.size}.",
        )
    recipe = _choose_recipe(settings, inputs, batch_size, student, context)
    if extra_texts:
        reporting.note(f"Each step the text tower sees {extra_texts:,} further texts.")
    # Before the start, which removes what an unfinished run left.
    if named is not None and not sidecar_path(folder.path, "distill").exists():
        named.validate_unmeasured(folder.students(ema=settings.ema is not None))
    steps = recipe.steps
    return DistillPlan(
        settings=settings,
        inputs=inputs,
        folder=folder,
        named=named,
        recipe=recipe,
        batch_size=batch_size,
        extra_texts=extra_texts,
        workers=choose_workers(settings.workers, context.device),
        log_every=max(1, steps // _MAX_LOG_LINES),
        eval_every=settings.eval_every or max(1, steps // 10),
        checkpoint_every=settings.checkpoint_every or max(1, min(1_000, steps // 10)),
    )


def _recorded_batch_size(settings: DistillSettings, folder: RunFolder) -> int | None:
    """Return the batch size of the run that a folder holds, which has another default on other GPUs; None without one."""
    run: Provenance | None = None
    if not settings.overwrite:
        with suppress(ClipcidError):  # what cannot be read is refused later, with what to do
            run = unfinished(folder.path, "distill")
            run = run or read_sidecar(sidecar_path(folder.path, "distill"), DistillSidecar)
    recorded = None if run is None else run.settings.get("batch_size")
    if not isinstance(recorded, int):
        return None
    reporting.note(f"Batch size: {recorded:,}, as in the run that {folder.path} holds.")
    return recorded


def validate_batch_size(settings: DistillSettings, batch_size: int, samples: int, context: DistContext) -> None:
    """Refuse a global batch that not all processes and parts divide, or that is larger than the data."""
    divisor = context.size * settings.accum_freq
    if batch_size % divisor:
        raise UsageError(
            f"--batch-size {batch_size} does not divide into {context.size} x {settings.accum_freq} equal parts "
            "(processes x --accum-freq).",
            f"Use a multiple of {divisor}.",
        )
    if samples < batch_size:
        lower = "Use fewer processes or a lower --accum-freq" if samples < divisor > 1 else "Lower --batch-size"
        raise ClipcidError(
            f"There are {samples:,} samples to train on, fewer than one batch of {batch_size:,}.",
            f"{lower}, or give more data." if samples else "Give more data.",
        )


def _choose_recipe(
    settings: DistillSettings,
    inputs: Inputs,
    batch_size: int,
    student: Student,
    context: DistContext,
) -> Recipe:
    """Decide number of steps, warm-up and learning rate, and say so."""
    samples = inputs.training.total
    steps = settings.steps or max(1, (settings.epochs or DEFAULT_EPOCHS) * samples // batch_size)
    warmup = min(steps // 10, 2_000) if settings.warmup is None else settings.warmup
    if warmup > steps:
        raise UsageError(f"--warmup {warmup:,} exceeds the {steps:,} steps of the run.", "Give fewer warm-up steps.")
    shards = len(inputs.training.sizes)
    shuffle = "uniform over all samples, in each epoch."
    if shards > SHARDS_MIXED:
        shuffle = (
            f"{shards:,} shards in a new order each epoch, samples uniformly among {SHARDS_MIXED} shards at a time "
            f"({SHARDS_MIXED / shards:.1%} of the data)."
        )
    shares = ""
    if context.size > 1:
        shares = f" ({batch_size // context.size:,} for each of {context.size} processes)"
    reporting.note(
        f"{samples:,} samples, {steps:,} steps of {batch_size:,}{shares}, {warmup:,} of them warm-up: "
        f"{steps * batch_size / samples:.1f} epochs; {inputs.held_out.total:,} more samples are held out.\n"
        f"Shuffle: {shuffle}"
    )
    if settings.optimizer == "muon":
        reporting.note("Optimizer: Muon for the layers of the towers, AdamW for the rest.")
    lr = settings.lr
    if lr is None:
        width = student.model.info.embed_dim
        trained = student.starts_trained
        lr, reason = default_rate(inputs.losses, settings.optimizer, batch_size, width, trained=trained)
        reporting.note(f"Learning rate: {lr:g} ({reason}).")
    return Recipe(
        optimizer=settings.optimizer,
        lr=lr,
        weight_decay=settings.wd,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        warmup=warmup,
        steps=steps,
        max_norm=settings.grad_clip_norm or None,
    )
