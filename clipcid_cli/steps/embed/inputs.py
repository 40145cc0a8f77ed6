"""What `embed` starts from: the data, its captions, and embeddings that exist already."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.fingerprint import FileRecord, find_changed
from clipcid_cli.formats.output import unfinished
from clipcid_cli.formats.sidecar import EmbedSidecar, read_sidecar, sidecar_path
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


def recorded_augmentation(sidecar: EmbedSidecar) -> dict[str, Any]:
    """Return the settings of `embed` that determined the views and text variants of finished embeddings."""
    made = sidecar.settings
    found = {name: made[name] for name in (*_VIEW_SETTINGS, *_TEXT_SETTINGS) if name in made}
    return found | ({"view_kind": tuple(found["view_kind"])} if "view_kind" in found else {})


def describe_shards(dataset: Dataset) -> list[FileRecord]:
    """Describe every shard for the sidecar: its content, and its name, which the metadata repeats."""
    found = zip(dataset.fingerprints(), dataset.shards, strict=True)
    return [msgspec.structs.replace(record, shard=shard.name) for record, shard in found]


def find_finished(
    folder: Path, settings: EmbedSettings, name: ModelName, dataset: Dataset, inputs: list[FileRecord]
) -> EmbedSidecar | None:
    """Return the sidecar of finished embeddings that match the request, without loading the model; None otherwise.

    Where the request leaves batch size or precision open, any will do.
    """
    path = sidecar_path(folder, "embed")
    sidecar = _read(path, settings.overwrite)
    if sidecar is None:
        return None
    made = sidecar.made
    same = (
        made.text == settings.text
        and made.keys == dataset.keys
        and made.fast_decode == settings.fast_decode
        and {name: made for name, made in sidecar.settings.items() if name in _AUGMENTATION}
        == augmentation_identity(settings)
        and settings.batch_size in (None, made.batch_size)
        and settings.precision in ("auto", made.precision)
        and [each.content for each in sidecar.inputs] == [each.content for each in inputs]
        and is_of(sidecar.model, name)
    )
    return sidecar if same and find_changed(folder, sidecar.outputs, path) is None else None


def _read(path: Path, overwrite: bool) -> EmbedSidecar | None:
    """Read a sidecar; None also where it cannot be read and is to be replaced."""
    try:
        return read_sidecar(path, EmbedSidecar)
    except ClipcidError:
        if overwrite:
            return None
        raise


def is_begun(folder: Path, inputs: list[FileRecord]) -> bool:
    """Tell whether there is an unfinished run on the very same data, which it begins once the data is checked."""
    run = unfinished(folder, "embed")
    return run is not None and [each.content for each in run.inputs] == [each.content for each in inputs]
