"""`export`: load a model, write each format into a hidden folder, compare it with the model, then move it into place."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from clipcid_cli.formats.files import write_json, write_text
from clipcid_cli.formats.fingerprint import FileRecord, hash_json, record
from clipcid_cli.formats.models.export_folder import CARD, PARITY, WEB, list_written, sync_files
from clipcid_cli.formats.models.export_sidecar import ExportSidecar, Parity
from clipcid_cli.formats.models.web_folder import write_engine
from clipcid_cli.formats.output import Output, OutputSpec, find_output, is_claimed, open_output
from clipcid_cli.records import ModelRecord
from clipcid_cli.runtime import interruption
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.export.card import render_card
from clipcid_cli.steps.export.check import Checker
from clipcid_cli.steps.export.forms import WRITERS, validate_forms
from clipcid_cli.steps.export.inputs import (
    CheckInputs,
    find_classes,
    find_data,
    read_inputs,
    validate_data,
    validate_measurable,
)
from clipcid_cli.steps.export.limits import SEARCH, validate_parity
from clipcid_cli.steps.export.plan import plan_export
from clipcid_cli.steps.export.search import Gallery, encode_gallery, find_gallery, write_gallery
from clipcid_cli.steps.settings.export import ExportSettings
from clipcid_cli.steps.settings.shared import output_settings


class ExportResult(msgspec.Struct):
    """What `export` answers: paths by their names without suffix, entries of `parity.json`, seconds by phase.

    Only `.pte` stays, since ONNX files may have the same names.
    """

    model: str
    files: dict[str, str] = {}
    parity: dict[str, Parity] = {}
    seconds: dict[str, float] = {}
    pushed: str | msgspec.UnsetType = msgspec.UNSET  # address of the commit


def run(settings: ExportSettings) -> ExportResult:
    """Export a model; with many processes the first does it, on the CPU."""
    with interruption.starts_over(), open_dist_context("cpu") as context:
        return context.on_rank0(lambda: _run(settings))


def _run(settings: ExportSettings) -> ExportResult:
    source, folder = plan_export(settings)
    classes, dataset, gallery = find_classes(settings), find_data(settings), find_gallery(settings)
    if settings.dry_run:
        validate_data(dataset, classes, settings)
        if is_claimed(folder, "export"):  # else the model need not be loaded
            model = load_model(source, torch.device("cpu"))
            spec = _identify(folder, model.info, read_inputs(model, dataset, classes, settings), gallery, settings)
            finished = _find_finished(find_output(spec), source.spec, settings)
            if finished is not None:
                return _describe(finished, source, folder)
        searched = "" if gallery is None else f", with a page that searches {len(gallery.samples):,} images"
        reporting.note(f"Would write {', '.join(settings.format)} of {source.spec} to {folder}{searched}.")
        return ExportResult(source.spec)
    seconds = dict[str, float]()
    with timed(seconds, "load"):
        model = load_model(source, torch.device("cpu"))
    validate_forms(model, settings)
    inputs = read_inputs(model, dataset, classes, settings)
    validate_measurable(inputs, settings)
    sidecar = _export(source, folder, Checker(model, inputs, settings), gallery, seconds)
    result = _describe(sidecar, source, folder)
    if settings.push is not None:
        from clipcid_cli.steps.export.push import push

        result.pushed = push(folder, sidecar, settings.push)
    return result


def _describe(sidecar: ExportSidecar, source: ModelName, folder: Path) -> ExportResult:
    files = {
        name if name.endswith(".pte") else str(Path(name).with_suffix("")): str(folder / name)
        for name in sidecar.written
    }
    return ExportResult(source.spec, files, sidecar.parity, sidecar.seconds)


def _export(
    source: ModelName, folder: Path, checker: Checker, gallery: Gallery | None, seconds: dict[str, float]
) -> ExportSidecar:
    """Write and compare the export, unless it is there."""
    info, inputs, settings = checker.model.info, checker.inputs, checker.settings
    with open_output(_identify(folder, info, inputs, gallery, settings)) as output:
        finished = _find_finished(output, info.spec, settings)
        if finished is not None:
            return finished
        output.begin_work()
        if "web" in settings.format:
            write_engine(output.work / WEB, settings.npm_packages)  # which may fail, so before what takes long
        images = None
        if gallery is not None:  # before the formats, too: its images may be damaged
            with timed(seconds, SEARCH):
                images = encode_gallery(checker, gallery)
        checker.warn_near_chance()
        parity = dict[str, Parity]()
        for form in settings.forms:
            reporting.note(f"Writing {form} and comparing it with {source.spec} …")
            with timed(seconds, form):
                parity |= WRITERS[form](checker, output.work)
        if images is not None:
            parity[SEARCH] = write_gallery(checker, images, output.work)
        write_json(output.work / PARITY, checker.describe() | {"parity": msgspec.to_builtins(parity)})
        written = list_written(output.work)
        write_text(output.work / CARD, render_card(info, source, settings, parity, written, inputs.classes))
        sync_files(output.work / name for name in [*written, CARD])
        return output.commit(
            counts={
                "images": len(inputs.pixels),
                "texts": len(inputs.texts),
                "skipped": dict(sorted(inputs.skips.counts.items())),
            },
            seconds=seconds,
            outputs=[record(output.work / name, output.work) for name in written],
            model=info,
            written=sorted([*written, CARD]),
            parity=parity,
        )


def _identify(
    folder: Path, info: ModelRecord, inputs: CheckInputs, gallery: Gallery | None, settings: ExportSettings
) -> OutputSpec[ExportSidecar]:
    """Say what decides the export."""
    decisive = output_settings(settings) | {
        "model": info.slug,
        "config": hash_json(info.config),
        "preprocess": info.preprocess_hash,
        "format": sorted(settings.format),
        "quantize": sorted(settings.quantize),
        "opset": settings.onnx_opset,
        "precision": settings.stored_precision,
        **({"static": True} if settings.static else {}),
    }
    weights = FileRecord(info.spec, info.parameters, info.weights_hash)
    lists = inputs.classes.fingerprints() if inputs.classes is not None else []
    searched = [] if gallery is None else [gallery.fingerprint()]
    return OutputSpec(
        folder,
        "export",
        ExportSidecar,
        settings=decisive,
        inputs=[weights, *lists, inputs.fingerprint(), *searched],
        overwrite=settings.overwrite,
        elsewhere="--work or --out",
        resumes=False,
    )


def _find_finished(output: Output[ExportSidecar], model: str, settings: ExportSettings) -> ExportSidecar | None:
    """Return the sidecar of an export that is there with all its files, and say so."""
    finished, folder = output.finished, output.folder
    if finished is None or not all((folder / name).exists() for name in finished.written):
        return None
    # Limits do not change the content, so an existing export is checked against those of this run.
    for form, recorded in finished.parity.items():
        validate_parity(form, recorded, model, settings)
    reporting.note(f"{folder} already holds this export.")
    return finished
