"""What `embed` starts from: the data, its captions, and embeddings that exist already."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.differences import are_among, list_differences
from clipcid_cli.formats.embeddings.writer import EmbeddingWriter
from clipcid_cli.formats.output import (
    find_changed,
    plan_identity,
    plan_path,
    read_sidecar,
    sidecar_path,
)
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.augment import STRONG
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.runtime.text_variants import RULES
from clipcid_cli.steps.model_identity import is_of
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.embed import EmbedSettings

# The settings that determine the views of an image and the variants of its captions; recorded where there are any.
_VIEW_SETTINGS = ("views", "view_kind", "crop_scale", "color_jitter", "gray_probability", "seed")
_TEXT_SETTINGS = ("text_variants", "seed")
_AUGMENTATION = {*_VIEW_SETTINGS, *_TEXT_SETTINGS, "strong_view", "text_variant_rules"}


def open_data(settings: EmbedSettings, reporter: Reporter) -> Dataset:
    """Open the data that was named, or else that of the embeddings in the work directory."""
    work = WorkDirectory(settings.work)
    if settings.data is None:
        try:
            own = work.embeddings(with_default_tag(parse_model(settings.model)).slug)
            described = work.find_data(own if sidecar_path(own, "embed").exists() else None)
        except ClipcidError as error:
            raise ClipcidError(
                f"No data was given, and the work directory names none: {error.message}",
                "Give the data as the first argument: a folder of tar shards, one tar, a folder of images or a list.",
            ) from error
        dataset = open_described(described, work.indexes)
        reporter.note(f"Taking the data of the embeddings in {settings.work}: {dataset.spec}.")
        return dataset
    columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
    return open_dataset(settings.data, settings.keys, columns, work.indexes)


def has_captions(dataset: Dataset) -> bool:
    """Tell whether any sample has a caption, of the first shard that has samples."""
    if dataset.index is not None:
        return next((record.with_captions > 0 for record in dataset.index.records if record.samples), False)
    for shard in dataset.shards:
        samples = shard.stream()
        first = next(samples, None)
        if first is not None:
            return bool(first.captions) or any(sample.captions for sample in samples)
    return False


def require_captions(dataset: Dataset, without_text: str) -> None:
    """Refuse data without captions, before a model is loaded.

    Args:
        without_text: How to embed the images alone, for the error; empty when captions are needed.

    Raises:
        ClipcidError: when the first shard with samples has none.
    """
    if not has_captions(dataset):
        captions = "captions next to the images (.txt, or --caption-column of a list)."
        raise ClipcidError(
            f"{dataset.spec}: none of the samples looked at (a shard) has a caption.",
            f"{without_text}\nOr put {captions}" if without_text else f"Put {captions}",
        )


def augmentation_identity(settings: EmbedSettings) -> dict[str, Any]:
    """Return what determines the views and text variants, as JSON values; empty where none are asked for."""
    names = [*(_VIEW_SETTINGS if settings.views else ()), *(_TEXT_SETTINGS if settings.text_variants else ())]
    found = {name: getattr(settings, name) for name in names}
    if settings.views:
        found["view_kind"] = list(settings.view_kinds)
        if "strong" in settings.view_kinds:
            found["strong_view"] = dataclasses.asdict(STRONG)
    if settings.text_variants:
        found["text_variant_rules"] = RULES
    return found


def recorded_augmentation(sidecar: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `embed` that determined the views and text variants of finished embeddings."""
    made = sidecar["settings"]
    found = {name: made[name] for name in (*_VIEW_SETTINGS, *_TEXT_SETTINGS) if name in made}
    return found | ({"view_kind": tuple(found["view_kind"])} if "view_kind" in found else {})


def describe_shards(dataset: Dataset) -> list[dict[str, Any]]:
    """Describe every shard for the sidecar: its content, and its name, which the metadata repeats."""
    found = zip(dataset.fingerprints(), dataset.shards, strict=True)
    return [fingerprint | {"shard": shard.name} for fingerprint, shard in found]


def find_finished(
    folder: Path, settings: EmbedSettings, name: ModelName, dataset: Dataset, inputs: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the sidecar of finished embeddings that match the request, without loading the model; None otherwise.

    Where the request leaves batch size or precision open, any will do.
    """
    sidecar = read_sidecar(sidecar_path(folder, "embed"))
    if sidecar is None:
        return None
    made = sidecar["settings"]
    same = (
        made["text"] == settings.text
        and made["keys"] == dataset.keys
        and made["fast_decode"] == settings.fast_decode
        and {name: made[name] for name in _AUGMENTATION if name in made} == augmentation_identity(settings)
        and settings.batch_size in (None, made["batch_size"])
        and settings.precision in ("auto", made["precision"])
        and plan_identity({}, sidecar.get("inputs", [])) == plan_identity({}, inputs)
        and is_of(sidecar["model"], name)
    )
    return sidecar if same and find_changed(folder, "embed", sidecar) is None else None


def reopen_grown(writer: EmbeddingWriter, identity: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
    """Prepare a finished folder for shards that were added since: those that it has stay.

    Args:
        identity: The settings, as in the sidecar.
    """
    sidecar = read_sidecar(sidecar_path(writer.folder, "embed"))
    if sidecar is None or sidecar["settings"] != identity or not are_among(sidecar.get("inputs", []), inputs):
        return
    if len(sidecar.get("inputs", [])) < len(inputs) and find_changed(writer.folder, "embed", sidecar) is None:
        writer.reopen(sidecar.get("outputs", []))


def is_begun(folder: Path, inputs: list[dict[str, Any]]) -> bool:
    """Tell whether an unfinished run on the very same data has left its plan, which it writes once the data is checked."""
    plan = read_sidecar(plan_path(folder, "embed"))
    return plan is not None and not list_differences(
        {"inputs": plan.get("inputs", [])}, {"settings": {}, "inputs": inputs}
    )
