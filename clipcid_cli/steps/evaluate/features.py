"""A model's features of one split, which later probes of the same model and data read again."""

from __future__ import annotations

import dataclasses

from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.results.features import ImageFeatures, features_path, read_features, write_features
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.model import EvaluatedModel
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask


def extract_features(model: EvaluatedModel, task: ZeroshotTask, data: list[FileRecord]) -> ImageFeatures:
    """Return a model's features of the split with the fingerprints `data`, which are kept for later runs."""
    info = model.model.info
    context = model.context
    identity = {
        "weights": info.weights_hash,
        "config": info.config,
        "preprocess": info.preprocess_hash,
        "data": [[file.size, file.hash] for file in data],
        "keys": task.dataset.keys,
        "columns": dataclasses.asdict(task.dataset.columns),
        "labels": task.label_of,
        "classes": len(task.class_names),
        "precision": model.precision.name,
        "batch_size": model.batch_size,
        "listed": ["skipped", "keys"],  # which earlier files lack
    }
    path = features_path(WorkDirectory(model.settings.work).features, info.slug, identity)
    kept = context.on_rank0(read_features, path)
    if kept is None and path.exists():
        reporting.warn(f"{path} is damaged: the features of {task.name} are computed again.")
    if kept is not None:
        reporting.note(f"{task.name}: features of {len(kept):,} images from {path}.")
        context.on_rank0(lambda: model.validate_usable(task, len(kept) + kept.skips.total, len(kept), kept.skips))
        return kept
    rows = model.encode(task)
    images = rows.encoded.rows[Kind.IMAGES]
    features = context.on_all(ImageFeatures, images, rows.labels, rows.skips, rows.keys)
    context.on_rank0(write_features, path, features)
    return features
