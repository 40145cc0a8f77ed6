"""`export`: load a model, write each format into a hidden folder, compare it with the model, then move it into place."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json, write_text
from clipcid_cli.formats.fingerprint import FileRecord, record, refuse_changed
from clipcid_cli.formats.models.export_folder import CARD, PARITY, refuse_foreign_folder, sync_files
from clipcid_cli.formats.models.hf_folder import check_hf_expressible
from clipcid_cli.formats.models.model_card import render_card
from clipcid_cli.formats.output import is_claimed, open_output
from clipcid_cli.formats.results.run_folder import RunFolder
from clipcid_cli.formats.sidecar import DistillSidecar, ExportSidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.names import ModelName, parse_model
from clipcid_cli.steps.export.card import describe_export, export_name
from clipcid_cli.steps.export.check import LIMITS, Checker
from clipcid_cli.steps.export.check_inputs import find_data, make_check_inputs
from clipcid_cli.steps.export.classes import Classes, read_classes
from clipcid_cli.steps.export.folders import write_hf, write_open_clip
from clipcid_cli.steps.export.onnx import check_measurable, check_onnx_expressible, write_onnx_files
from clipcid_cli.steps.model_choice import choose_model
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.export import ExportSettings
from clipcid_cli.steps.settings.fields import output_settings

# What writes and runs the files of a format, from the extra `export`.
_PACKAGES = {"open-clip": (), "hf": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


def run(settings: ExportSettings, reporter: Reporter) -> dict[str, Any]:
    """Export a model; with many processes the first does it, on the CPU.

    Returns:
        The JSON object: ``model, files{}, parity{export: {precision, image, text, bytes, images_per_second, zeroshot}},
        seconds{}``.
    """
    source = choose_model(settings.model, settings.work, reporter)
    if settings.ema:
        source = _find_average(source, reporter)
    folder = settings.out or WorkDirectory(settings.work).export(export_name(source))
    for form in settings.format:
        _check_installed(form)
    classes = read_classes(settings)
    if source.path is not None and folder.resolve() == source.path.resolve():
        raise ClipcidError(
            f"Model {source.spec} is the folder {folder}, so its export would overwrite it.",
            "Give another folder with --out.",
        )
    refuse_foreign_folder(folder, settings.format, overwrite=settings.overwrite)
    if settings.dry_run:
        find_data(settings)
        reporter.note(f"Would write {', '.join(settings.format)} of {source.spec} to {folder}.")
        return {"model": source.spec, "files": {}, "parity": {}, "seconds": {}}
    with open_machine("cpu") as machine:
        sidecar = machine.on_main(lambda: _export(source, folder, settings, classes, reporter))
    return {
        "model": source.spec,
        "files": {Path(name).stem: str(folder / name) for name in sidecar.written},
        "parity": sidecar.parity,
        "seconds": sidecar.seconds,
    }


def _check_installed(form: str) -> None:
    missing = [name for name in _PACKAGES[form] if importlib.util.find_spec(name) is None]
    if missing:
        raise ClipcidError(
            f"--format {form} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            "Install them: pip install 'clipcid[export]'",
        )


def _find_average(student: ModelName, reporter: Reporter) -> ModelName:
    """Find the model with averaged weights of a student's run."""
    fix = "Train with clipcid distill --ema DECAY, such as 0.999, or omit --ema."
    folder = None if student.path is None else student.path.resolve()
    if folder is None or not is_claimed(folder.parent, "distill"):
        raise ClipcidError(
            f"--ema: {student.spec} is no student of clipcid distill, so there is no average of it.", fix
        )
    run = RunFolder(folder.parent)
    path = sidecar_path(run.path, "distill")
    sidecar = read_sidecar(path, DistillSidecar)
    if sidecar is None:
        raise ClipcidError(f"--ema: the run in {run.path} is unfinished.", "Run its command again, which finishes it.")
    if sidecar.made.ema is None:
        raise ClipcidError(f"--ema: the run in {run.path} kept no average of the weights.", fix)
    refuse_changed(
        run.path,
        sidecar.outputs,
        path,
        f"Name the model as it is now: {run.student_ema}; or train it again, by its command and --overwrite.",
    )
    average, here = run.student_ema, Path.cwd()
    if average.is_relative_to(here):
        average = average.relative_to(here)
    reporter.note(f"Average of the weights: {average}, decay {sidecar.made.ema}.")
    return parse_model(str(average))


def _export(
    source: ModelName, folder: Path, settings: ExportSettings, classes: Classes | None, reporter: Reporter
) -> ExportSidecar:
    started = time.perf_counter()
    model = load_model(source, torch.device("cpu"))
    seconds = {"load": time.perf_counter() - started}
    # Refuse what a format cannot express before anything is read or written.
    if "hf" in settings.format:
        check_hf_expressible(model.info.config, model.info.preprocess, model.info.tokenizer)
    if "onnx" in settings.format:
        check_onnx_expressible(model, settings)
    identity = output_settings(settings) | {
        "model": model.info.slug,
        "format": sorted(settings.format),
        "quantize": sorted(settings.quantize),
        "opset": settings.onnx_opset,
        "precision": settings.stored_precision,
    }
    inputs = [FileRecord(model.info.spec, model.info.parameters, model.info.weights_hash)]
    inputs += [record(file) for file in classes.files] if classes is not None else []
    compared = make_check_inputs(model, settings, classes, reporter)
    check_measurable(compared, settings, reporter)
    inputs.append(compared.fingerprint())
    checker = Checker(model, compared, settings)
    wanted: dict[str, Any] = {"settings": identity, "inputs": inputs, "overwrite": settings.overwrite}
    with open_output(folder, "export", ExportSidecar, **wanted, resumes=False) as output:
        if output.finished is not None and all((folder / name).exists() for name in output.finished.written):
            # Limits do not change the content, so an existing export is checked against those of this run.
            for name, found in output.finished.parity.items():
                checker.validate(name, found)
            reporter.note(f"{folder} already holds this export.")
            return output.finished
        output.start()
        parity: dict[str, Any] = {}
        for form in settings.format:
            reporter.note(f"Writing {form} and comparing it with {source.spec} …")
            started = time.perf_counter()
            if form == "open-clip":
                parity[form] = write_open_clip(checker, output.work)
            elif form == "hf":
                parity[form] = write_hf(checker, output.work)
            else:
                parity |= write_onnx_files(checker, output.work, classes)
            seconds[form] = time.perf_counter() - started
        write_json(output.work / PARITY, _describe_parity(checker, parity))
        card = describe_export(model.info, source, settings, parity)
        written = sorted(path.name for path in output.work.iterdir() if not path.name.startswith("."))
        write_text(output.work / CARD, render_card(card, written))
        sync_files(output.work)
        return output.commit(
            counts={
                "images": len(compared.images),
                "texts": len(compared.texts),
                "skipped": dict(sorted(compared.skips.counts.items())),
            },
            seconds=seconds,
            outputs=[record(output.work / name, output.work) for name in written],
            model=dataclasses.asdict(model.info),
            written=sorted([*written, CARD]),
            parity=parity,
        )


def _describe_parity(checker: Checker, parity: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `parity.json`: the reference, the limits, and what was measured."""
    info = checker.model.info
    allowed: dict[str, Any] = {kind: dataclasses.asdict(checker.limit(kind)) for kind in LIMITS}
    for limit in allowed.values():
        if math.isinf(limit["max_difference"]):
            limit["max_difference"] = None
    return {
        "reference": {
            "model": info.spec,
            "weights_hash": info.weights_hash,
            "engine": f"PyTorch {torch.__version__}",
            "precision": "fp32",
            "threads": torch.get_num_threads(),
            "bytes": sum(tensor.nbytes for tensor in checker.model.module.state_dict().values()),
            "images_per_second": round(1 / checker.expected.seconds, 2),
            "inputs": checker.inputs.source,
            "images": len(checker.inputs.images),
        },
        "allowed": allowed | {"max_accuracy_drop": checker.settings.max_accuracy_drop},
        "parity": parity,
    }
