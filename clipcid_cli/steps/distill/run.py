"""`distill`: plan a run, train a small CLIP, write the student, its logs and its report."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.algorithms.losses.registry import LOSSES, default_rate
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.files import write_text
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output, OutputSpec, find_output
from clipcid_cli.formats.results.boards import validate_board
from clipcid_cli.formats.results.clusters import read_cluster_sidecar
from clipcid_cli.formats.results.keep_list import read_keep_list
from clipcid_cli.formats.results.run_folder import RunFolder, list_checkpoints, write_held_out
from clipcid_cli.formats.sidecar import DistillSidecar, RepairFigures, sidecar_path
from clipcid_cli.formats.skips import Skips
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.runtime.models.clip_model import hash_preprocess
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.pipeline import default_workers, start_worker_server
from clipcid_cli.runtime.randomness import SHARDS_MIXED
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.claim import claim_output, scratch_folder
from clipcid_cli.steps.data_index import warn_of_copies
from clipcid_cli.steps.distill.cost import DistillCost, estimate_cost
from clipcid_cli.steps.distill.evaluation import plan_evaluation, zeroshot_settings
from clipcid_cli.steps.distill.inputs import Inputs, find_embeddings, find_inputs, named_teachers
from clipcid_cli.steps.distill.report import write_report
from clipcid_cli.steps.distill.student import Student, load_student, write_students
from clipcid_cli.steps.distill.teacher import describe_weights, load_online_model
from clipcid_cli.steps.distill.trainer import Plan, Trainer
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.evaluate.result import ZeroshotResult, ZeroshotResults
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask
from clipcid_cli.steps.evaluate.zeroshot import ZeroshotPlan, evaluate
from clipcid_cli.steps.inputs import NO_KEEP_LIST
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.shared import output_settings
from clipcid_cli.training.optimisers import Recipe

DEFAULT_EPOCHS = 32
# Samples of a batch by default: at least so many (fewer if the data has fewer), with --steps so many for each GPU. On GPUs
# without --steps up to so many for each as long as that leaves so many steps.
_SMALLEST_BATCH = 256
_LARGEST_BATCH_PER_GPU = 512
_ENOUGH_STEPS = 20_000

# The log has at most about this many lines, whatever the length of the run.
_MAX_LOG_LINES = 5_000


class Distilled(msgspec.Struct, omit_defaults=True):
    """What a run made."""

    student: str
    steps: int
    samples: int
    samples_per_second: float
    losses: dict[str, float]  # those of the last step that was logged
    metrics: dict[str, float]  # those of the last evaluation during the training
    evaluations: list[ZeroshotResult]  # what `eval-zeroshot` returns for ``--eval-data``
    seconds: dict[str, float]  # time by phase
    files: dict[str, str]
    repair: RepairFigures | None = None  # that of the teacher, where it was repaired


def run(settings: DistillSettings) -> Distilled | DistillCost | EmbedCost:
    """Train a student; with ``--dry-run`` estimate what that takes, or first the embeddings that it lacks."""
    started = time.perf_counter()
    if settings.workers != 0:
        start_worker_server()
    with open_dist_context(settings.device) as context, scratch_folder(context, dry_run=settings.dry_run) as scratch:
        tasks = context.on_rank0(lambda: _validate_named(settings))
        student = context.on_all(lambda: load_student(settings, context.device))
        embeddings = find_embeddings(settings, context)
        if isinstance(embeddings, EmbedCost):
            return embeddings
        plan = context.on_rank0(lambda: _plan_run(settings, student, embeddings, tasks, scratch, context))
        warn_of_copies(plan.inputs.dataset, context)
        teacher = load_online_model(plan.inputs, context)
        folder = plan.folder
        spec = OutputSpec(
            folder.path,
            "distill",
            DistillSidecar,
            settings=identity(plan, student),
            inputs=plan.inputs.fingerprints + ([] if teacher is None else [describe_weights(teacher)]),
            overwrite=settings.overwrite,
            elsewhere="--name",
        )
        if settings.dry_run:
            context.on_rank0(lambda: find_output(spec))
            validate_samples(plan.inputs.dataset, context, settings.seed, dry_run=True)
            cost = estimate_cost(Trainer(plan, student, teacher, context))
            cost.evaluations = plan.evaluations.preview()
            return cost
        with claim_output(context, spec) as output:
            sidecar = output.finished
            if sidecar is not None:
                reporting.note(f"{folder.path} holds this run already, finished.")
            else:
                context.on_rank0(lambda: validate_board(settings.report_to, quiet=settings.quiet))
                context.on_rank0(lambda: output.start(folder.clear))
                # An unfinished run without a checkpoint may have ended because of what this finds.
                if not (output.resumed and context.on_rank0(lambda: list_checkpoints(folder.checkpoints))):
                    validate_samples(plan.inputs.dataset, context, settings.seed, dry_run=False)
                trainer = Trainer(plan, student, teacher, context, output)
                first = trainer.state.step
                seconds = {"prepare": time.perf_counter() - started}
                with closing(trainer.log):  # after the sidecar: a board may wait for a network
                    with timed(seconds, "train"):
                        trainer.train()
                    speed = (plan.steps - first) * plan.batch_size / seconds["train"]
                    unreadable = trainer.unreadable_images()
                    sidecar = context.on_rank0(lambda: write(trainer, output, unreadable, speed, seconds))
            # After the sidecar: a run that is killed here is finished, and evaluates what is left when it is run again.
            evaluated = evaluate(plan.evaluations, context) if tasks else ZeroshotResults([], {})
    files = {
        "student": folder.student,
        **({"student_ema": folder.student_ema} if sidecar.made.ema is not None else {}),
        "train_log": folder.train_log,
        "results_log": folder.results_log,
        "report": folder.report,
        "sidecar": sidecar_path(folder.path, "distill"),
    }
    return Distilled(
        student=str(folder.student),
        evaluations=evaluated.results,
        seconds=sidecar.seconds,
        files={name: str(path) for name, path in files.items()}
        | {f"evaluation_{name}": path for name, path in evaluated.files.items()},
        **sidecar.result,
    )


def _validate_named(settings: DistillSettings) -> list[ZeroshotTask]:
    """Look at what can be wrong with named inputs before hours of embedding; return the data sets of ``--eval-data``."""
    if settings.needs_teacher:
        named_teachers(settings)
    if settings.keep_list not in (None, NO_KEEP_LIST):
        read_keep_list(Path(settings.keep_list))
    if any(LOSSES[name].needs_clusters for name in settings.losses()):
        read_cluster_sidecar(
            settings.clusters or WorkDirectory(settings.work).find_clusters(**_flags_of_several(settings))
        )
    return plan_evaluation(zeroshot_settings(settings))


def _flags_of_several(settings: DistillSettings) -> dict[str, Any]:
    """Return the flags by which `cluster` takes several teachers, whose embeddings may not exist yet."""
    if settings.num_teachers == 1:
        return {}
    work = WorkDirectory(settings.work)
    folders = settings.embeddings or tuple(work.embeddings(teacher.slug) for teacher in named_teachers(settings))
    return {"embeddings": folders, "teacher_weight": settings.teacher_weight}


def _plan_run(
    settings: DistillSettings,
    student: Student,
    embeddings: tuple[Path, ...],
    tasks: list[ZeroshotTask],
    scratch: Path | None,
    context: DistContext,
) -> Plan:
    """Plan a run, on the first process."""
    inputs = find_inputs(settings, embeddings, scratch)
    batch_size = choose_batch_size(settings, inputs.training.total, context)
    extra_texts = inputs.num_extra_texts(batch_size)
    if extra_texts % context.size:
        raise UsageError(
            f"--extra-texts {extra_texts} does not divide among {context.size} processes.",
            f"Use a multiple of {context.size}.",
        )
    recipe = _choose_recipe(settings, inputs, batch_size, student, context)
    if extra_texts:
        reporting.note(f"Each step the text tower sees {extra_texts:,} further texts.")
    parts = [student.model.info.slug, settings.chosen_preset, f"s{settings.seed}"]
    name = settings.name or "-".join(parts + ["all"] * (inputs.keep_list is None))
    folder = RunFolder(WorkDirectory(settings.work).distill(name))
    students = [ModelName(str(path), "folder", path=path) for path in folder.students(ema=settings.ema is not None)]
    evaluations = ZeroshotPlan(students, tasks, zeroshot_settings(settings))
    # Before the start, which removes what an unfinished run left.
    if not sidecar_path(folder.path, "distill").exists():
        evaluations.validate_unmeasured()
    steps = recipe.steps
    return Plan(
        settings=settings,
        inputs=inputs,
        folder=folder,
        evaluations=evaluations,
        recipe=recipe,
        batch_size=batch_size,
        extra_texts=extra_texts,
        workers=default_workers(context.device) if settings.workers is None else settings.workers,
        log_every=max(1, steps // _MAX_LOG_LINES),
        eval_every=settings.eval_every or max(1, steps // 10),
        checkpoint_every=settings.checkpoint_every or max(1, min(1_000, steps // 10)),
    )


def choose_batch_size(settings: DistillSettings, samples: int, context: DistContext) -> int:
    """Return the size of a global batch, which all processes and parts divide; refuse one that is larger than the data.

    By default it is the largest power of two that leaves enough steps, within the bounds.
    """
    divisor = context.size * settings.accum_freq
    batch_size = settings.batch_size
    if batch_size is None:
        batch_size = _SMALLEST_BATCH
        if context.device.type == "cuda" and settings.steps is not None:
            batch_size *= context.size
        elif context.device.type == "cuda":
            shown = (settings.epochs or DEFAULT_EPOCHS) * samples
            while 2 * batch_size <= min(_LARGEST_BATCH_PER_GPU * context.size, shown // _ENOUGH_STEPS):
                batch_size *= 2
        batch_size = max(divisor, min(batch_size, samples) // divisor * divisor)
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
    return batch_size


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
    each = f" ({batch_size // context.size:,} for each of {context.size} processes)" if context.size > 1 else ""
    reporting.note(
        f"{samples:,} samples, {steps:,} steps of {batch_size:,}{each}, {warmup:,} of them warm-up: "
        f"{steps * batch_size / samples:.1f} epochs; {inputs.held_out.total:,} more samples are held out.\n"
        f"Shuffle: {shuffle}"
    )
    if settings.optimizer == "muon":
        reporting.note("Optimizer: Muon for the layers of the towers, AdamW for the rest.")
    lr = settings.lr
    if lr is None:
        width = student.model.info.embed_dim
        trained = student.starts_trained
        lr, reason = default_rate(settings.losses(), settings.optimizer, batch_size, width, trained=trained)
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


def identity(plan: Plan, student: Student) -> dict[str, Any]:
    """Return all that determines the student, except its inputs' content, as JSON values."""
    settings = plan.settings
    given = output_settings(settings)
    # Data and teacher are inputs, identified by their content, however they were named.
    for name in ("data", "teacher", "epochs", "init_from"):
        del given[name]
    info = student.model.info
    clusters = plan.inputs.clusters
    given |= {
        "preset": settings.chosen_preset,
        "precision": student.precision.name,
        "warmup": plan.recipe.warmup,
        "lr": plan.recipe.lr,
        "losses": {name: dataclasses.asdict(weight) for name, weight in settings.losses(plan.inputs.trust).items()},
        "student": {
            "config": info.config,
            "weights": info.weights_hash,
            "pixels": hash_preprocess(info.preprocess, fast_decode=settings.fast_decode),
        },
        "batch_size": plan.batch_size,
        "extra_texts": plan.extra_texts,
        "eval_every": plan.eval_every,
        "steps": plan.steps,
        "views": "stored" if settings.shows_views else "none",
        "cluster_towers": "both" if clusters is not None and clusters.teach_text else "image",
    }
    if clusters is not None:
        given["cluster_temperature"] = clusters.temperatures
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain


def write(
    trainer: Trainer,
    output: Output[DistillSidecar],
    unreadable: dict[str, str],
    samples_per_second: float,
    seconds: dict[str, float],
) -> DistillSidecar:
    """Write student, report and, last, the sidecar; the time of it is added to `seconds`."""
    plan = trainer.plan
    inputs = plan.inputs
    folder = plan.folder
    info = trainer.student.model.info
    skips = Skips.of(unreadable)
    skips.merge(inputs.usable.skips)
    if skips.total:
        reporting.warn(f"Unusable samples: {skips.total:,}\n{skips.describe()}")
    with timed(seconds, "write"):
        written = write_students(folder, trainer.student.model, str(plan.settings.student), trainer.state)
        write_held_out(folder.held_out, inputs.held_out_keys())
        write_text(folder.report, write_report(trainer))
    result: dict[str, Any] = {
        "steps": plan.steps,
        "samples": plan.steps * plan.batch_size,
        "samples_per_second": round(samples_per_second, 1),
        "losses": trainer.losses,
        "metrics": trainer.metrics,
    }
    if inputs.repair is not None and inputs.repair.repaired:
        result["repair"] = msgspec.to_builtins(inputs.repair)
    return output.commit(
        counts={
            "read": inputs.usable.read,
            "used": inputs.training.total,
            "held_out": inputs.held_out.total,
            "skipped": dict(sorted(skips.counts.items())),
        },
        seconds=seconds,
        outputs=[
            *(record(file, folder.path) for each in written for file in sorted(each.iterdir())),
            record(folder.held_out, folder.path),
        ],
        model={"spec": info.spec, "parameters": info.parameters, "embed_dim": info.embed_dim},
        data=inputs.dataset.describe(),
        keep_list=None if inputs.keep_list is None else inputs.keep_list.describe(),
        result=result,
    )
