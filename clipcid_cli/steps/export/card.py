"""The content of an export's model card, taken from the sidecars of the steps that made the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.models.model_card import UNKNOWN, ModelCard
from clipcid_cli.formats.results.metrics import read_metrics, refuse_changed_metrics
from clipcid_cli.formats.results.run_folder import RunFolder
from clipcid_cli.formats.sidecar import AnySidecar, DistillSidecar, EmbedSidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.clip_model import ModelInfo
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.steps.settings.export import ExportSettings

_LIBRARIES = {"open-clip": "open_clip", "hf": "transformers", "onnx": "onnx"}


def describe_export(info: ModelInfo, source: ModelName, settings: ExportSettings, parity: dict[str, Any]) -> ModelCard:
    """Collect what is known about a model; the folder of a run's student leads to the sidecars of that run."""
    work = settings.work
    weights = f"{info.tag} of open_clip" if info.tag is not None else info.weights_hash
    student = source.path.resolve() if source.path is not None else None
    sidecar = _read(student.parent, "distill", DistillSidecar) if student is not None else None
    if student is not None and sidecar is not None:
        run = RunFolder(student.parent)
        if student == run.student_ema:
            weights += f", an exponential moving average of those in training (decay {sidecar.made.ema})"
        if WorkDirectory(run.path.parents[1]).distill(run.path.name) == run.path:
            work = run.path.parents[1]
    facts = {
        "Architecture": info.architecture or _shape(info),
        "Weights": weights,
        "Parameters": f"{info.parameters:,}",
        "Embedding width": str(info.embed_dim),
        "Image size": f"{info.image_size[0]} × {info.image_size[1]}",
        "Context length": str(info.context_length),
        **_training(sidecar),
        "Licence of the weights": settings.license or UNKNOWN,
        "Licence of the training data": UNKNOWN,
    }
    return ModelCard(
        name=export_name(source),
        license=settings.license or UNKNOWN,
        library=_LIBRARIES[settings.format[0]],
        facts=facts,
        metrics=list(_find_metrics(WorkDirectory(work), info.weights_hash)),
        precision=settings.stored_precision,
        parity=parity,
        dense=settings.dense,
    )


def export_name(source: ModelName) -> str:
    """Name the export of a training run's student after the run, and any other after the model."""
    path = None if source.path is None else source.path.resolve()
    if path is None or path.name not in ("student", "student-ema"):
        return source.slug
    return path.parent.name + path.name.removeprefix("student")


def _shape(info: ModelInfo) -> str:
    """Describe an architecture that has no name."""
    towers = {"image tower": info.config["vision_cfg"], "text tower": info.config["text_cfg"]}
    parts = [f"{tower} {config.get('layers', '?')} × {config.get('width', '?')}" for tower, config in towers.items()]
    return ", ".join(parts) + " (layers × width)"


def _training(sidecar: DistillSidecar | None) -> dict[str, str]:
    if sidecar is None:
        return dict.fromkeys(("Teacher", "Training data", "Keep ratio", "Losses", "Training"), UNKNOWN)
    losses, counts, result = sidecar.made.losses, sidecar.counts, sidecar.result
    return {
        "Teacher": "none" if set(losses) == {"clip"} else _teacher(sidecar),
        "Training data": f"{_short(sidecar.data.spec)}; {counts['used']:,} of {counts['read']:,} samples used",
        "Keep ratio": _keep_ratio(sidecar),
        "Losses": ", ".join(f"{name} × {loss['value']:g}" for name, loss in losses.items()),
        "Training": f"{result['steps']:,} steps, {result['samples']:,} samples",
    }


def _teacher(sidecar: DistillSidecar) -> str:
    """Name the model whose embeddings the run read."""
    folders = dict.fromkeys(Path(each.path).parent for each in sidecar.inputs)  # each is of one kind of rows
    embedded = (_read(folder, "embed", EmbedSidecar) for folder in folders)
    return next((_short(found.model.spec) for found in embedded if found is not None), UNKNOWN)


def _keep_ratio(sidecar: DistillSidecar) -> str:
    """State the ratio of the list that the run used; the work directory may hold another one by now."""
    keep = sidecar.keep_list
    if keep is None:
        return "1 (not balanced)"
    return f"{keep.kept / keep.images:.4g} ({keep.kept:,} of {keep.images:,} images)"


def _find_metrics(work: WorkDirectory, weights_hash: str) -> Iterator[tuple[str, str, str, float, str]]:
    """Yield the metrics that were measured on exactly these weights, by the hash of the whole file."""
    for path in sorted(work.eval.glob("*.json")):
        try:
            content = read_metrics(path)
            sidecar = refuse_changed_metrics(path, "")
        except ClipcidError:
            continue  # not ours, changed, or damaged: it states nothing
        if sidecar is None or weights_hash not in [each.hash for each in sidecar.inputs]:
            continue
        prompts = ", ".join(lines.hash for lines in (sidecar.prompts or {}).values())
        for name, value in content.metrics.items():
            if isinstance(value, int | float):
                yield content.dataset, content.task, name, float(value), prompts


def _read(folder: Path, step: str, kind: type[AnySidecar]) -> AnySidecar | None:
    """Read a sidecar; None when there is none, or it is not ours."""
    try:
        return read_sidecar(sidecar_path(folder, step), kind)
    except ClipcidError:
        return None


def _short(spec: str) -> str:
    """Name data or a model: a local folder by its last part, since its path means nothing on another machine."""
    return spec if ":" in spec else Path(spec).name
