"""Embeddings for another step: found in its work directory, or made there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clipcid_cli.errors import ClipcidError, command_line
from clipcid_cli.formats.embeddings.folder import read_embed_sidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.steps.embed.plan import choose_text
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.embed.run import make_embeddings
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.embed import EmbedSettings
from clipcid_cli.steps.settings.shared import ReadingSettings


def ensure_embeddings(
    settings: ReadingSettings,
    machine: Machine,
    reporter: Reporter,
    *,
    data: str | None,
    model: str,
    text: bool | None = None,
) -> Path:
    """Find the embeddings another step needs in its work directory, and make them where they are missing.

    Args:
        text: Whether text embeddings are needed; None makes them where the data has captions.

    Returns:
        Folder of finished embeddings of this model over this data. Existing ones are taken whatever their batch size and
        precision.
    """
    name = with_default_tag(parse_model(model))
    folder = WorkDirectory(settings.work).embeddings(name.slug)
    request = EmbedSettings(
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(ReadingSettings)}
        | {"batch_size": None, "precision": "auto"},
        data=data,
        model=model,
        text=bool(text),
    )
    sidecar = machine.on_main(lambda: read_embed_sidecar(folder))
    if sidecar is not None:
        own = {field.name for field in dataclasses.fields(EmbedSettings)} - {"keys", "batch_size", "precision"}
        made = {name: getattr(sidecar.made, name) for name in own.intersection(sidecar.settings)}
        request = dataclasses.replace(request, **made | {"text": sidecar.made.text or bool(text)})
    elif text is None:
        request = dataclasses.replace(request, text=machine.on_main(lambda: choose_text(request, reporter)))
    result = make_embeddings(request, machine, reporter, "" if text else embed_images_first(request, name))
    if isinstance(result, EmbedCost):
        raise ClipcidError(
            f"There are no embeddings of {name.spec} in {folder}; making them would take about "
            f"{result.seconds['encode']:,} s for {result.images:,} images.",
            "--dry-run can estimate the cost of this step once they are made: "
            + command_line("embed", data or "DATA", model=model, work=settings.work, **settings.data_flags),
        )
    return folder


def embed_images_first(request: EmbedSettings, name: ModelName) -> str:
    """Give the command for embeddings that a step without captions accepts; this run has begun ones with text."""
    data = () if request.data is None else (request.data,)
    flags: dict[str, Any] = {**request.data_flags, "work": request.work, "text": False, "overwrite": True}
    flags.pop("caption_column", None)
    return f"Embed the images alone first: {command_line('embed', *data, model=name.spec, **flags)}"
