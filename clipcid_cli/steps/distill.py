"""`distill`: find the inputs, train a small CLIP on them, write the student, its logs and its report."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.atomic import write_text
from clipcid_cli.formats.checkpoint import list_checkpoints, read_checkpoint
from clipcid_cli.formats.model_folder import write_model_folder
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.run_folder import RunFolder
from clipcid_cli.formats.work import WorkDirectory
from clipcid_cli.runtime.augmentation import Augmentation, TrainingPixels
from clipcid_cli.runtime.encoder import ClipModel, load_model
from clipcid_cli.runtime.loading import default_workers, start_worker_server
from clipcid_cli.runtime.machine import Machine, open_machine
from clipcid_cli.runtime.model_names import parse_model
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.runtime.seeds import derive_seed
from clipcid_cli.runtime.training import LossParameters, OptimiserPlan, Trainer
from clipcid_cli.runtime.vocabulary import train_used_rows, whole_state
from clipcid_cli.steps.distill_inputs import Inputs, find_embeddings, find_inputs
from clipcid_cli.steps.distill_report import write_report
from clipcid_cli.steps.objective import Objective
from clipcid_cli.steps.outputs import claim_output
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.fields import output_settings
from clipcid_cli.steps.teacher_targets import open_targets
from clipcid_cli.steps.training_data import BatchMaker, BatchOrder, read_held_out, used_tokens
from clipcid_cli.steps.training_loop import Loop, Pace

DEFAULT_EPOCHS = 32
DEFAULT_BATCH_SIZE = 256
# Held-out samples beyond this many are left to eval-zeroshot: evaluation during training should take seconds.
HELD_OUT_LIMIT = 5_000


def run(settings: DistillSettings, reporter: Reporter) -> dict[str, Any]:
    """Train a student.

    Returns:
        The JSON object: ``student, steps, samples, samples_per_second, losses{}, metrics{}, seconds{}, files{}``.

    Raises:
        ClipcidError: when an input is missing or does not fit, or training diverges.
    """
    started = time.perf_counter()
    start_worker_server()
    with open_machine(settings.device) as machine:
        embeddings = find_embeddings(settings, machine, reporter)
        inputs = machine.on_main(lambda: find_inputs(settings, embeddings, reporter))
        student = load_model(parse_model(str(settings.student)), machine.device, fresh_seed=settings.seed)
        plan = plan_run(settings, inputs, machine, reporter)
        work = WorkDirectory(settings.work)
        folder = RunFolder(work.distill(settings.name or default_name(settings, student, inputs)))
        if settings.dry_run:
            return describe(settings, student, inputs, plan, folder, reporter)
        wanted = output_settings(settings) | {
            "losses": {name: dataclasses.asdict(weight) for name, weight in settings.losses().items()},
            "student": {"config": student.info.config, "weights": student.info.weights_hash},
            "batch_size": plan.batch_size,
            "steps": plan.optimiser.steps,
        }
        with claim_output(
            machine,
            folder.path,
            "distill",
            settings=json.loads(json.dumps(wanted)),
            inputs=inputs.fingerprints,
            overwrite=settings.overwrite,
        ) as output:
            if output.finished is not None:
                reporter.note(f"{folder.path} holds this run already, finished.")
                return result(folder, output.finished)
            seconds = {"prepare": time.perf_counter() - started}
            sidecar = train(settings, machine, inputs, student, plan, folder, output, seconds, reporter)
    return result(folder, sidecar)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        optimiser: How parameters are updated, for how many steps.
        batch_size: Samples of a global batch.
        workers: Processes that prepare batches, for each training process.
    """

    optimiser: OptimiserPlan
    batch_size: int
    workers: int


def plan_run(settings: DistillSettings, inputs: Inputs, machine: Machine, reporter: Reporter) -> Plan:
    """Settle batch size, number of steps and warm-up.

    Raises:
        UsageError: when the batch does not divide among the processes.
        ClipcidError: when there are fewer training samples than a batch has.
    """
    samples = inputs.training.total
    batch_size = settings.batch_size or max(
        machine.size, min(DEFAULT_BATCH_SIZE, samples // machine.size * machine.size)
    )
    if batch_size % machine.size:
        raise UsageError(
            f"--batch-size {batch_size} does not divide among {machine.size} processes.",
            f"Use a multiple of {machine.size}.",
        )
    if samples < batch_size:
        raise ClipcidError(
            f"There are {samples:,} samples to train on, fewer than one batch of {batch_size:,}.",
            "Lower --batch-size, or give more data.",
        )
    epochs = settings.epochs or DEFAULT_EPOCHS
    steps = settings.steps or max(1, epochs * samples // batch_size)
    warmup = min(steps // 10, 2_000) if settings.warmup is None else settings.warmup
    if warmup > steps:
        raise UsageError(f"--warmup {warmup:,} exceeds the {steps:,} steps of the run.", "Give fewer steps of warm-up.")
    reporter.note(
        f"{samples:,} samples, {steps:,} steps of {batch_size:,}: {steps * batch_size / samples:.1f} epochs, "
        f"{warmup:,} steps of warm-up."
    )
    optimiser = OptimiserPlan(
        lr=settings.lr,
        weight_decay=settings.wd,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        warmup=warmup,
        steps=steps,
        max_norm=settings.grad_clip_norm or None,
    )
    return Plan(optimiser, batch_size, default_workers() if settings.workers is None else settings.workers)


def default_name(settings: DistillSettings, student: ClipModel, inputs: Inputs) -> str:
    """Name a run after its student, preset and seed, and after the keep list when there is none to be had."""
    parts = [student.info.slug, settings.chosen_preset, f"s{settings.seed}"]
    return "-".join(parts if inputs.keep_list is not None else [*parts, "all"])


def train(
    settings: DistillSettings,
    machine: Machine,
    inputs: Inputs,
    student: ClipModel,
    plan: Plan,
    folder: RunFolder,
    output: Output,
    seconds: dict[str, float],
    reporter: Reporter,
) -> dict[str, Any]:
    """Train, and write everything that comes of it; return the sidecar."""
    targets = None
    if inputs.teaching is not None:
        targets = open_targets(settings, inputs.teaching, student.info.embed_dim, machine, reporter)
    losses = settings.losses()
    width = student.info.embed_dim if targets is None else targets.width
    weights = {name: weight.at(width) for name, weight in losses.items()}
    reporter.note("Loss: " + " + ".join(f"{value:g}·{name}" for name, value in weights.items()) + ".")
    parameters = LossParameters(
        [name for name in weights if LOSSES[name].own_scale],
        student.info.embed_dim,
        targets.width if targets is not None and targets.is_projected else None,
        derive_seed("loss parameters", settings.seed),
    ).to(machine.device)
    used = used_tokens(inputs.dataset, inputs.usable, student.tokenizer)
    if used is not None and train_used_rows(student.module, used):
        reporter.note(
            f"The captions use {len(used):,} tokens; only their embeddings are trained, the others decay as AdamW has it."
        )
    trainer = Trainer(student.module, parameters, plan.optimiser)
    precision = choose_precision(settings.precision, machine.device, "train", student.info.parameters)
    reporter.note(f"Precision: {precision.name} ({precision.reason}).")
    bad = restore(settings, trainer, folder, output, machine, reporter)
    augmentation = Augmentation(settings.crop_scale, settings.color_jitter, settings.gray_probability)
    pixels = TrainingPixels(student.info.preprocess, augmentation)
    steps = plan.optimiser.steps
    transform = student.pixel_transform()
    loop = Loop(
        machine=machine,
        student=student,
        trainer=trainer,
        objective=Objective(weights, parameters, targets, machine.size),
        order=BatchOrder(inputs.dataset, inputs.training, settings.seed, plan.batch_size),
        maker=BatchMaker(
            pixels,
            student.tokenizer,
            settings.seed,
            first_caption=targets is not None,
            caption_dropout=settings.caption_dropout,
        ),
        held_out=read_held_out(inputs.dataset, inputs.held_out, transform, student.tokenizer, HELD_OUT_LIMIT),
        precision=precision,
        changes_colors=augmentation.changes_colors,
        pace=Pace(
            steps,
            settings.eval_every or max(1, steps // 10),
            settings.checkpoint_every or max(1, min(1_000, steps // 10)),
        ),
        run=folder,
        seed=settings.seed,
        workers=plan.workers,
        max_bad_fraction=settings.max_bad_fraction,
        reporter=reporter,
        bad=bad if machine.is_main else {},
    )
    started, first = time.perf_counter(), trainer.step
    loop.train()
    seconds["train"] = time.perf_counter() - started
    skips = loop.bad_images()
    skips.merge(inputs.usable.skips)

    def finish() -> dict[str, Any]:
        began = time.perf_counter()
        source = parse_model(str(settings.student)).path
        write_model_folder(
            folder.student,
            student.info.config,
            student.info.preprocess,
            whole_state(student.module, plan.optimiser.decay_after(steps)),
            tokenizer_from=source if source is not None and source.is_dir() else None,
        )
        write_text(folder.report, write_report(folder, settings, student, inputs, loop))
        seconds["write"] = time.perf_counter() - began
        samples_per_second = (steps - first) * plan.batch_size / seconds["train"] if steps > first else 0.0
        return output.commit(
            counts={
                "read": inputs.usable.read,
                "used": inputs.training.total,
                "held_out": inputs.held_out.total,
                "skipped": dict(sorted(skips.counts.items())),
            },
            seconds=seconds,
            model={
                "spec": student.info.spec,
                "parameters": student.info.parameters,
                "embed_dim": student.info.embed_dim,
            },
            data=inputs.dataset.describe(),
            keep_list=None if inputs.keep_list is None else str(inputs.keep_list),
            val_fraction=settings.val_fraction,
            result={
                "steps": steps,
                "samples": steps * plan.batch_size,
                "samples_per_second": round(samples_per_second, 1),
                "losses": loop.terms,
                "metrics": loop.metrics,
            },
        )

    if skips.total:
        reporter.warn(f"{skips.total:,} samples were not used as they are:\n{skips.describe()}")
    return machine.on_main(finish)


def restore(
    settings: DistillSettings,
    trainer: Trainer,
    folder: RunFolder,
    output: Output,
    machine: Machine,
    reporter: Reporter,
) -> dict[str, str]:
    """Go on from the newest checkpoint of an unfinished run of the same settings and inputs, or clear the folder.

    Returns:
        The unreadable images met so far: reason by key.

    Raises:
        ClipcidError: for ``--resume latest`` when there is nothing to go on from.
    """
    steps = list_checkpoints(folder.checkpoints) if output.resumed and settings.resume != "never" else []
    if not steps:
        if settings.resume == "latest":
            raise ClipcidError(
                f"--resume latest, but {folder.path} has no checkpoint of an unfinished run with these settings.",
                "Leave --resume away to start one.",
            )
        machine.on_main(folder.clear)
        return {}
    state = read_checkpoint(folder.checkpoints, steps[-1])
    trainer.load(state)
    machine.on_main(lambda: folder.rewind(trainer.step))
    reporter.note(f"Going on from step {trainer.step:,} of {trainer.plan.steps:,}.")
    bad: dict[str, str] = state["bad"]
    return bad


def describe(
    settings: DistillSettings, student: ClipModel, inputs: Inputs, plan: Plan, folder: RunFolder, reporter: Reporter
) -> dict[str, Any]:
    """Say what a run would do, for ``--dry-run``."""
    parameters = student.info.parameters
    # Weights, gradients and AdamW's two moments in float32.
    reporter.note(
        f"Student: {parameters / 1e6:.1f} M parameters, "
        f"{16 * parameters / 2**20:,.0f} MiB with gradients and AdamW's moments.\n"
        f"Losses: {', '.join(settings.losses())}. Held out: {inputs.held_out.total:,} samples.\n"
        f"Would write to {folder.path}."
    )
    return {
        "student": str(folder.student),
        "steps": plan.optimiser.steps,
        "samples": plan.optimiser.steps * plan.batch_size,
        "parameters": parameters,
        "files": {},
    }


def result(folder: RunFolder, sidecar: dict[str, Any]) -> dict[str, Any]:
    """Build the step's JSON object from the sidecar."""
    files: dict[str, Path] = {
        "student": folder.student,
        "train_log": folder.train_log,
        "results_log": folder.results_log,
        "report": folder.report,
        "sidecar": folder.path / "distill.json",
    }
    return {
        "student": str(folder.student),
        **sidecar["result"],
        "seconds": sidecar["seconds"],
        "files": {name: str(path) for name, path in files.items()},
    }
