"""`distill`: find the inputs, train a small CLIP on them, write the student, its logs and its report."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.formats.output import find_output
from clipcid_cli.formats.results.checkpoint import list_checkpoints
from clipcid_cli.formats.results.clusters import read_cluster_sidecar
from clipcid_cli.formats.results.keep_list import read_keep_list
from clipcid_cli.formats.results.run_folder import RunFolder, import_tensorboard
from clipcid_cli.formats.sidecar import DistillSidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.runtime.models.clip_model import ClipModel
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.models.preprocess import hash_preprocess
from clipcid_cli.runtime.pipeline import start_worker_server
from clipcid_cli.runtime.precision import choose_precision
from clipcid_cli.steps.claim import claim_output
from clipcid_cli.steps.distill.cluster_targets import temperatures
from clipcid_cli.steps.distill.cost import estimate_cost
from clipcid_cli.steps.distill.evaluation import plan_evaluation, zeroshot_settings
from clipcid_cli.steps.distill.inputs import TrainingInputs, find_inputs
from clipcid_cli.steps.distill.online_teacher import describe_weights, load_online_teacher
from clipcid_cli.steps.distill.plan import Plan, default_name, plan_run
from clipcid_cli.steps.distill.student import load_student
from clipcid_cli.steps.distill.teacher_inputs import find_embeddings
from clipcid_cli.steps.distill.training_run import TrainingRun
from clipcid_cli.steps.evaluate.result import ZeroshotResults
from clipcid_cli.steps.evaluate.zeroshot import ZeroshotPlan, evaluate
from clipcid_cli.steps.keep_list import NO_KEEP_LIST
from clipcid_cli.steps.preflight import check_samples
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.scratch import scratch_folder
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.fields import output_settings


def run(settings: DistillSettings, reporter: Reporter) -> dict[str, Any]:
    """Train a student.

    Returns:
        The JSON object: ``student, steps, samples, samples_per_second, losses{}, metrics{}, evaluations[], seconds{},
        files{}``; ``evaluations`` holds what `eval-zeroshot` returns for each data set of ``--eval-data``.
    """
    started = time.perf_counter()
    if settings.workers != 0:
        start_worker_server()
    if settings.report_to == "tensorboard":
        import_tensorboard()  # before hours of embedding, and on every process, so that none waits for one that failed
    with open_machine(settings.device) as machine, scratch_folder(machine, dry_run=settings.dry_run) as scratch:
        # What can be wrong with these is said before hours of embedding.
        machine.on_main(lambda: refuse_missing(settings))
        student, zeroshot = load_student(settings, machine, reporter), zeroshot_settings(settings)
        tasks = machine.on_main(lambda: plan_evaluation(zeroshot, reporter))
        embeddings = find_embeddings(settings, machine, reporter)
        inputs = machine.on_main(lambda: find_inputs(settings, embeddings, scratch, reporter))
        teacher = load_online_teacher(inputs.teacher_inputs, machine)
        width = student.model.info.embed_dim
        plan = machine.on_main(lambda: plan_run(settings, inputs, width, machine, reporter))
        name = settings.name or default_name(settings, student.model, inputs)
        folder = RunFolder(WorkDirectory(settings.work).distill(name))
        written = [ModelName(str(path), "folder", path=path) for path in folder.students(ema=settings.ema is not None)]
        evaluations = ZeroshotPlan(written, tasks, zeroshot)
        # Before the start, which removes what an unfinished run left.
        if not machine.on_main(sidecar_path(folder.path, "distill").exists):
            machine.on_main(evaluations.validate_unmeasured)
        inputs_of_run = inputs.fingerprints + ([] if teacher is None else [describe_weights(teacher)])
        wanted: dict[str, Any] = {"settings": identity(settings, student.model, plan, inputs), "inputs": inputs_of_run}
        wanted |= {"overwrite": settings.overwrite, "elsewhere": "--name"}
        if settings.dry_run:
            machine.on_main(lambda: find_output(folder.path, "distill", DistillSidecar, **wanted))
            check_samples(inputs.dataset, machine, settings.seed, dry_run=True, reporter=reporter)
            training = TrainingRun(settings, machine, inputs, student, teacher, plan, tasks, folder, None, reporter)
            return estimate_cost(training) | {"evaluations": evaluations.preview(reporter)}
        with claim_output(machine, folder.path, "distill", DistillSidecar, **wanted) as output:
            sidecar = output.finished
            if sidecar is not None:
                reporter.note(f"{folder.path} holds this run already, finished.")
            else:
                machine.on_main(lambda: output.start(folder.clear))
                # An unfinished run without a checkpoint may have ended because of what this finds.
                if not (output.resumed and machine.on_main(lambda: list_checkpoints(folder.checkpoints))):
                    check_samples(inputs.dataset, machine, settings.seed, dry_run=False, reporter=reporter)
                training = TrainingRun(
                    settings, machine, inputs, student, teacher, plan, tasks, folder, output, reporter
                )
                sidecar = training.train({"prepare": time.perf_counter() - started})
            # After the sidecar: a run that is killed here is finished, and evaluates what is left when it is run again.
            found = evaluate(evaluations, machine, reporter) if tasks else ZeroshotResults([], {})
    return result(folder, sidecar, found)


def refuse_missing(settings: DistillSettings) -> None:
    """Refuse (ClipcidError) a keep list that is none, and clusters that are not there."""
    if settings.keep_list not in (None, NO_KEEP_LIST):
        read_keep_list(Path(settings.keep_list))
    if any(LOSSES[name].needs_clusters for name in settings.losses()):
        read_cluster_sidecar(settings.clusters or WorkDirectory(settings.work).find_clusters())


def identity(settings: DistillSettings, student: ClipModel, plan: Plan, inputs: TrainingInputs) -> dict[str, Any]:
    """Return the identity of a run: all that determines the student, except its inputs' content, as JSON values."""
    given = output_settings(settings)
    # Data and teacher are inputs, identified by their content, however they were named.
    for name in ("data", "teacher", "epochs", "init_from"):
        del given[name]
    precision = choose_precision(settings.precision, student.device, "train", student.info.parameters)
    given |= {
        "preset": settings.chosen_preset,
        "precision": precision.name,
        "warmup": plan.optimiser.warmup,
        "lr": plan.optimiser.lr,
        "losses": {name: dataclasses.asdict(weight) for name, weight in settings.losses().items()},
        "student": {
            "config": student.info.config,
            "weights": student.info.weights_hash,
            "pixels": hash_preprocess(student.info.preprocess, fast_decode=settings.fast_decode),
        },
        "batch_size": plan.batch_size,
        "extra_texts": plan.extra_texts,
        "eval_every": plan.eval_every,
        "steps": plan.optimiser.steps,
        "text_variant_share": settings.variant_share,
        "views": "stored" if settings.shows_views else "none",
    }
    given["cluster_towers"] = "image"
    if inputs.teacher_inputs is not None and inputs.teacher_inputs.clusters is not None:
        given["cluster_temperature"] = temperatures(inputs.teacher_inputs.clusters, settings)
        given["cluster_towers"] = "both" if inputs.teacher_inputs.text_clusters else "image"
    plain: dict[str, Any] = json.loads(json.dumps(given))
    return plain


def result(folder: RunFolder, sidecar: DistillSidecar, evaluations: ZeroshotResults) -> dict[str, Any]:
    """Build the step's JSON object."""
    files = {
        "student": folder.student,
        **({"student_ema": folder.student_ema} if sidecar.made.ema is not None else {}),
        "train_log": folder.train_log,
        "results_log": folder.results_log,
        "report": folder.report,
        "sidecar": folder.path / "distill.json",
    }
    student, measured = (
        {"student": str(folder.student)},
        {"evaluations": evaluations.results, "seconds": sidecar.seconds},
    )
    found: dict[str, Any] = student | sidecar.result | measured
    written = {name: str(path) for name, path in files.items()}
    return found | {"files": written | {f"evaluation_{name}": path for name, path in evaluations.files.items()}}
