"""The model card of an export, from the sidecars of the steps that made the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcid_cli import __version__
from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.models.export_folder import CONTENT
from clipcid_cli.formats.models.export_sidecar import Parity
from clipcid_cli.formats.report import render_report
from clipcid_cli.formats.results.metrics import RETRIEVAL, find_variant, read_metrics, validate_unchanged_metrics
from clipcid_cli.formats.results.run_folder import DistillSidecar, RunFolder
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.records import ModelRecord
from clipcid_cli.runtime.models.names import CONFIG_NAME, ModelName
from clipcid_cli.shown import short_name
from clipcid_cli.steps.export.inputs import Classes
from clipcid_cli.steps.settings.export import ExportSettings

_UNKNOWN = "unknown"
# Data set, task, metric, images, value, hashes of the prompts.
_Measurement = tuple[str, str, str, str, str, str]
_LIBRARIES = {"open-clip": "open_clip", "hf": "transformers", "onnx": "onnx", "executorch": "executorch", "web": "onnx"}


def render_card(
    info: ModelRecord,
    source: ModelName,
    settings: ExportSettings,
    parity: Mapping[str, Parity],
    files: Sequence[str],
    classes: Classes | None = None,
) -> str:
    """Write the model card in Markdown; the folder of a run's student leads to the sidecars of that run."""
    work = WorkDirectory(settings.work)
    run = None
    is_average = False
    weights = f"{info.tag} of open_clip" if info.tag is not None else info.weights_hash
    if source.path is not None:
        folder = RunFolder(source.path.resolve().parent)
        run = _read_run(folder.path)
        if run is not None:
            is_average = source.path.resolve() == folder.student_ema
            if is_average:
                weights += f", an exponential moving average of those in training (decay {run.made.ema})"
            made_in = WorkDirectory(folder.path.parents[1])
            if made_in.distill(folder.path.name) == folder.path:
                work = made_in
    facts = {
        "Architecture": info.architecture or _shape(info),
        "Weights": weights,
        "Parameters": f"{info.parameters:,}",
        "Embedding width": str(info.embed_dim),
        "Image size": f"{info.image_size[0]} × {info.image_size[1]}",
        "Context length": str(info.context_length),
        **_training(run),
        "Licence of the weights": settings.license or _UNKNOWN,
        "Licence of the training data": _UNKNOWN,
    }
    # The same weights may have been measured in two folders, as in the run's and in an export.
    metrics = list(dict.fromkeys(_find_metrics(work, info.weights_hash, source)))
    # A run that wrote other weights than those of the folder now measured those.
    if run is not None and info.weights_hash in [file.hash for file in run.outputs]:
        held_out = f"{short_name(run.data.spec)}-held-out"
        if held_out not in [data for data, *_ in metrics]:  # as `eval-zeroshot` calls it
            metrics += _measured_in_training(run, held_out, is_average=is_average)
    card = render_report(
        "model_card.jinja",
        name=export_name(source),
        version=__version__,
        license=settings.license or _UNKNOWN,
        library=_LIBRARIES[settings.format[0]],
        facts=facts,
        metrics=metrics,
        has_probe=any(task.startswith("linear_probe") for _, task, *_ in metrics),
        precision=settings.stored_precision,
        parity=parity,
        dense=settings.dense,
        files=files,
        content=CONTENT,
        classes=classes,
    )
    return card.rstrip() + "\n"


def export_name(source: ModelName) -> str:
    """Name the export of a training run's student after the run, and any other after the model."""
    path = None if source.path is None else source.path.resolve()
    if path is None or path.name not in ("student", "student-ema"):
        return source.slug
    return path.parent.name + path.name.removeprefix("student")


def _shape(info: ModelRecord) -> str:
    """Describe an architecture that has no name."""
    towers = {"image tower": info.config["vision_cfg"], "text tower": info.config["text_cfg"]}
    parts = [f"{tower} {config.get('layers', '?')} × {config.get('width', '?')}" for tower, config in towers.items()]
    return ", ".join(parts) + " (layers × width)"


def _training(run: DistillSidecar | None) -> dict[str, str]:
    if run is None:
        return dict.fromkeys(("Teacher", "Training data", "Keep ratio", "Losses", "Training"), _UNKNOWN)
    losses, counts = run.made.losses, run.counts
    keep = run.keep_list  # the one that the run used; the work directory may hold another by now
    ratio = f"{keep.kept / keep.images:.4g} ({keep.kept:,} of {keep.images:,} images)" if keep else "1 (not balanced)"
    # What a loss of the user's own reads is not recorded: all that there is.
    is_taught = any(LOSSES[name].needs_teacher if name in LOSSES else run.teacher is not None for name in losses)
    kept = {"Text tower": "of the teacher, unchanged"} if run.made.text_tower == "teacher" else {}
    used = f"{counts['used']:,} of {counts['read']:,} samples used, {counts['held_out']:,} more held out"
    return {
        "Teacher": (run.teacher or _UNKNOWN) if is_taught or kept else "none",
        **kept,
        "Training data": f"{short_name(run.data.spec)}; {used}",
        "Keep ratio": ratio,
        "Losses": _describe_weights(losses),
        "Training": f"{run.result['steps']:,} steps, {run.result['samples']:,} samples",
    }


def _describe_weights(losses: dict[str, dict[str, Any]]) -> str:
    """Write the losses with their factors, as a preset states them."""
    factors = [f"{name} × {loss['value']:g}" + ("/D" if loss.get("per_width") else "") for name, loss in losses.items()]
    legend = " (D: dimensions in which features are compared)"
    return ", ".join(factors) + (legend if any(loss.get("per_width") for loss in losses.values()) else "")


def _measured_in_training(run: DistillSidecar, held_out: str, *, is_average: bool) -> Iterator[_Measurement]:
    """Yield what the run measured in the end on its held-out part."""
    # Without captions, or unreadable, some are no part of it.
    images = f"up to {run.counts['held_out']:,}"
    for name, value in run.held_out_metrics(averaged=is_average).items():
        yield held_out, RETRIEVAL, name, images, f"{value:.4f}", ""


def _find_metrics(work: WorkDirectory, weights_hash: str, source: ModelName) -> Iterator[_Measurement]:
    """Yield what was measured on these very weights.

    The data set is named with the variant, as ``photos (caption-lines)``. Where both are folders, they have the same
    configuration, too.
    """
    config = record(source.path / CONFIG_NAME).hash if source.path is not None and source.kind == "folder" else None
    for path in sorted(work.eval.glob("*.json")):
        try:
            content = read_metrics(path)
            sidecar = validate_unchanged_metrics(path, "")
        except ClipcidError:
            continue  # not ours, changed, or damaged: it states nothing
        if sidecar is None or weights_hash not in [file.hash for file in sidecar.inputs]:
            continue
        measured = [file.hash for file in sidecar.inputs if Path(file.path).name == CONFIG_NAME]
        if measured and config not in (None, *measured):
            continue
        prompts = ", ".join(lines.hash for lines in (sidecar.prompts or {}).values())
        variant = ", ".join(find_variant(path, content.task).split("_"))
        data = f"{content.dataset} ({variant})" if variant else content.dataset
        task = content.task
        if repeated := sidecar.counts.get("repeated_images", 0):
            task += f", {repeated:,} test images among those of training"
        for name, value in content.metrics.items():
            if isinstance(value, int | float):
                yield data, task, name, f"{sidecar.counts['images']:,}", f"{value:.4f}", prompts


def _read_run(folder: Path) -> DistillSidecar | None:
    """Read the sidecar of a run; None when there is none, or it is not ours."""
    try:
        return read_sidecar(sidecar_path(folder, "distill"), DistillSidecar)
    except ClipcidError:
        return None
