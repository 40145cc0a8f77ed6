"""`distill`: plan a run, train a small CLIP, write the student, its logs and its report."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from clipcid_cli.formats.files import write_text
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.run_folder import DistillSidecar, write_held_out
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.formats.skipped import skipped_file, write_skipped
from clipcid_cli.runtime.distributed import DistContext, device_memory, open_dist_context
from clipcid_cli.runtime.pipeline import start_worker_server
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.claim import claim_output, preview_output, scratch_folder
from clipcid_cli.steps.distill.checkpoints import begin_run
from clipcid_cli.steps.distill.memory import validate_memory
from clipcid_cli.steps.distill.plan import DistillPlan, make_plan, validate_named
from clipcid_cli.steps.distill.report import write_report
from clipcid_cli.steps.distill.result import DistillCost, Distilled
from clipcid_cli.steps.distill.samples import count_unreadable, list_skipped
from clipcid_cli.steps.distill.stored import find_embeddings
from clipcid_cli.steps.distill.student import Student, load_student, write_students
from clipcid_cli.steps.distill.trainer import Trainer
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.distill import DistillSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.embed.result import EmbedCost


def run(settings: DistillSettings) -> Distilled | DistillCost | EmbedCost:
    """Train a student; with ``--dry-run`` estimate what that takes, or first the embeddings that it lacks."""
    started = time.perf_counter()
    if settings.workers != 0:
        start_worker_server()
    with open_dist_context(settings.device) as context, scratch_folder(context, dry_run=settings.dry_run) as scratch:
        named = context.on_rank0(validate_named, settings)
        student = context.on_all(load_student, settings, context.device)
        embeddings = find_embeddings(settings, context)
        if not isinstance(embeddings, tuple):
            return embeddings
        memories = context.gather(device_memory(context.device))
        plan = context.on_rank0(make_plan, settings, student, embeddings, named, scratch, context, memories)
        if context.size > 1:
            from clipcid_cli.steps.shard_copies import warn_of_copies

            warn_of_copies(plan.inputs.dataset, context)
        plan = plan.loaded(context)
        if settings.dry_run:
            return _preview(plan, student, context)
        with claim_output(context, plan.identify(student)) as output:
            if output.finished is not None:
                reporting.note(f"{plan.folder.path} holds this run already, finished.")
                sidecar = output.finished
            else:
                sidecar = _train(plan, student, output, context, started)
            # After the sidecar: a run that is killed here is finished, and evaluates what is left when it is run again.
            evaluated = None if named is None else named.evaluate(plan.students, context)
    folder = plan.folder
    files = {
        "student": folder.student,
        **({"student_ema": folder.student_ema} if sidecar.made.ema is not None else {}),
        "train_log": folder.train_log,
        "results_log": folder.results_log,
        "report": folder.report,
        **skipped_file(sidecar, folder.path),
        "sidecar": sidecar_path(folder.path, "distill"),
    }
    paths = {name: str(path) for name, path in files.items()}
    if evaluated is not None:
        paths |= {f"evaluation_{name}": path for name, path in evaluated.files.items()}
    return Distilled(
        student=str(folder.student),
        evaluations=[] if evaluated is None else evaluated.results,
        seconds=sidecar.seconds,
        files=paths,
        **sidecar.result,
    )


def _preview(plan: DistillPlan, student: Student, context: DistContext) -> DistillCost:
    """Check all that a run would check, and measure what it would take."""
    from clipcid_cli.steps.distill.cost import measure_cost

    spec = plan.identify(student)
    context.on_rank0(preview_output, spec, "this run", "What follows is of all its steps.")
    validate_memory(plan, student, context)
    validate_samples(plan.inputs.dataset, context, plan.settings, dry_run=True)
    cost = measure_cost(Trainer(plan, student, context))
    if plan.named is not None:
        cost.evaluations = plan.named.preview(plan.students)
    return cost


def _train(
    plan: DistillPlan, student: Student, output: Output[DistillSidecar], context: DistContext, started: float
) -> DistillSidecar:
    """Start a run or go on with it, train, and write what it ends with."""
    settings, folder = plan.settings, plan.folder
    if settings.report_to != "none":
        from clipcid_cli.formats.results.boards import validate_board

        context.on_rank0(validate_board, settings.report_to, quiet=settings.quiet)
    validate_memory(plan, student, context)
    first = context.on_rank0(begin_run, output, folder, settings.resume)
    if not first:  # an unfinished run without a checkpoint may have ended because of what this finds
        validate_samples(plan.inputs.dataset, context, settings, dry_run=False)
    trainer = Trainer(plan, student, context, output, first)
    seconds = {"prepare": time.perf_counter() - started}
    with closing(trainer.log):  # after the sidecar: a board may wait for a network
        with timed(seconds, "train"):
            trainer.train()
        speed = (plan.steps - first) * plan.batch_size / seconds["train"]
        unreadable = trainer.unreadable_images()
        return context.on_rank0(write, trainer, output, unreadable, speed, seconds)


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
    skips = count_unreadable(inputs.dataset, unreadable)
    skips.merge(inputs.usable.skips)
    if skips.total:
        reporting.warn(f"Unusable samples: {skips.total:,}\n{skips.describe()}")
    with timed(seconds, "write"):
        written = write_students(folder, trainer.student, trainer.state)
        write_held_out(folder.held_out, inputs.held_out_keys())
        listed = list_skipped(inputs.dataset, unreadable, captions=plan.settings.shows_captions)
        has_skipped = write_skipped(folder.skipped, listed)
        write_text(folder.report, write_report(trainer))
    result: dict[str, Any] = {
        "steps": plan.steps,
        "samples": plan.steps * plan.batch_size,
        "samples_per_second": round(samples_per_second, 1),
        "losses": trainer.losses,
        "metrics": trainer.metrics,
    }
    if trainer.evaluation.chance:
        result["chance"] = trainer.evaluation.chance
    result |= inputs.teacher.judgement.recorded()
    return output.commit(
        counts={
            "read": inputs.usable.read,
            "used": inputs.training.total,
            "held_out": inputs.held_out.total,
            "skipped": dict(sorted(skips.counts.items())),
        },
        seconds=seconds,
        outputs=[
            *(record(file, folder.path) for student in written for file in sorted(student.iterdir())),
            *(record(file, folder.path) for file in (folder.held_out, *([folder.skipped] if has_skipped else []))),
        ],
        model={"spec": info.spec, "parameters": info.parameters, "embed_dim": info.embed_dim},
        teacher=inputs.teacher.model_name,
        data=inputs.dataset.describe(),
        keep_list=None if inputs.keep_list is None else inputs.keep_list.describe(),
        result=result,
    )
