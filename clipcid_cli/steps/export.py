"""`export`: read a model, write it in other forms out of sight, compare each with the model, then give it its name."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.algorithms.parity import Difference
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.atomic import write_json
from clipcid_cli.formats.export_folder import FORMAT_FILES, PARITY, build_export, refuse_foreign_folder
from clipcid_cli.formats.onnx_file import check_onnx_installed
from clipcid_cli.formats.output import open_output
from clipcid_cli.formats.work import WorkDirectory
from clipcid_cli.runtime.encoder import load_model
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.runtime.model_names import ModelName, parse_model, with_default_tag
from clipcid_cli.steps.export_forms import BATCH_SIZES, FormOptions, write_onnx_encoders, write_open_clip
from clipcid_cli.steps.parity_inputs import make_parity_inputs
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.export import ExportSettings
from clipcid_cli.steps.settings.fields import output_settings

# Largest differences allowed on unit rows. fp32: the order of summation. The others: weights rounded to 11 or 8 bits, felt
# through every layer.
_LIMITS = {
    "fp32": Difference(max_difference=1e-4, min_cosine=0.99999),
    "fp16": Difference(max_difference=5e-3, min_cosine=0.9999),
    "bf16": Difference(max_difference=2e-2, min_cosine=0.999),
}
_WRITERS = {"open-clip": write_open_clip, "onnx": write_onnx_encoders}


def run(settings: ExportSettings, reporter: Reporter) -> dict[str, Any]:
    """Export a model; with many processes the first does it, on the CPU.

    Returns:
        The JSON object: ``model, files{}, parity{form: {image, text}}, seconds{}``.

    Raises:
        ClipcidError: when the model cannot be read or written in a form, differs too much in it, or the folder holds the
            model itself or files of others.
    """
    source = _choose_model(settings, reporter)
    folder = settings.out or WorkDirectory(settings.work).export(_export_name(source))
    if "onnx" in settings.format:
        check_onnx_installed()
    _refuse_own_folder(source, folder)
    refuse_foreign_folder(folder, settings.format)
    if settings.dry_run:
        reporter.note(f"Would write {', '.join(settings.format)} of {source.spec} to {folder}.")
        return _result(source, folder, settings, {"parity": {}, "seconds": {}})
    with open_machine("cpu") as machine:
        sidecar = machine.on_main(lambda: _export(source, folder, settings, reporter))
    return _result(source, folder, settings, sidecar)


def _choose_model(settings: ExportSettings, reporter: Reporter) -> ModelName:
    if settings.model is not None:
        named = parse_model(settings.model)
        source = with_default_tag(named)
        if source != named:
            reporter.note(f"Weights: {source.spec}.")
        return source
    student = WorkDirectory(settings.work).find_student()
    reporter.note(f"Model: {student}, the newest student of {settings.work}.")
    return parse_model(str(student))


def _export_name(source: ModelName) -> str:
    """Name the export of a training run's student after the run, and any other after the model."""
    if source.path is not None and source.path.resolve().name == "student":
        return source.path.resolve().parent.name
    return source.slug


def _refuse_own_folder(source: ModelName, folder: Path) -> None:
    """Refuse to write over the model that is read, whatever wrote it."""
    if source.path is not None and folder.resolve() == source.path.resolve():
        raise ClipcidError(
            f"Model {source.spec} is the folder {folder}, so its export would be written over it.",
            "Give another folder with --out.",
        )


def _export(source: ModelName, folder: Path, settings: ExportSettings, reporter: Reporter) -> dict[str, Any]:
    started = time.perf_counter()
    model = load_model(source, torch.device("cpu"))
    seconds = {"load": time.perf_counter() - started}
    wanted = output_settings(settings) | {"model": model.info.slug, "format": sorted(settings.format)}
    inputs = [{"path": model.info.spec, "size": model.info.parameters, "hash": model.info.weights_hash}]
    with open_output(folder, "export", settings=wanted, inputs=inputs, overwrite=settings.overwrite) as output:
        if output.finished is not None:
            reporter.note(f"{folder} holds this export already.")
            return output.finished
        precision = "fp32" if settings.precision == "auto" else settings.precision
        limit = _LIMITS[precision]
        if settings.max_difference is not None:
            limit = dataclasses.replace(limit, max_difference=settings.max_difference)
        options = FormOptions(precision, settings.opset, limit, source.path)
        samples = make_parity_inputs(model, settings, reporter, count=max(BATCH_SIZES))
        parity: dict[str, Any] = {}
        with build_export(folder) as building:
            for form in settings.format:
                reporter.note(f"Writing {form} and comparing it with {source.spec} …")
                started = time.perf_counter()
                parity[form] = _WRITERS[form](model, building, samples, options)
                seconds[form] = time.perf_counter() - started
            reference = {
                "model": model.info.spec,
                "weights_hash": model.info.weights_hash,
                "engine": f"PyTorch {torch.__version__}",
                "precision": "fp32",
                "inputs": samples.source,
            }
            allowed = {"precision": precision, **dataclasses.asdict(limit)}
            write_json(building / PARITY, {"reference": reference, "allowed": allowed, "parity": parity})
        return output.commit(
            counts={"images": len(samples.pixels), "texts": len(samples.tokens)},
            seconds=seconds,
            model=dataclasses.asdict(model.info),
            parity=parity,
        )


def _result(source: ModelName, folder: Path, settings: ExportSettings, sidecar: dict[str, Any]) -> dict[str, Any]:
    names = [name for form in settings.format for name in FORMAT_FILES[form]] + [PARITY]
    names += [path.name for path in sorted(folder.glob("*.onnx.data"))]  # weights above 2 GB
    return {
        "model": source.spec,
        "files": {Path(name).stem: str(folder / name) for name in names},
        "parity": sidecar["parity"],
        "seconds": sidecar["seconds"],
    }
