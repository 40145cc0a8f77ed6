"""Embeddings that another step needs: those of its work directory, made where they are missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcid_cli.errors import command_line, flag_words
from clipcid_cli.formats.embeddings.sidecar import read_embed_sidecar
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.names import ModelName, with_default_tag
from clipcid_cli.steps import reporting
from clipcid_cli.steps.embed.plan import choose_text, make_plan, take_finished
from clipcid_cli.steps.models import choose_embeddings, find_model
from clipcid_cli.steps.settings.embed import EmbedSettings, configured
from clipcid_cli.steps.settings.shared import ReadingSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.embed.result import EmbedCost


def ensure_embeddings(
    settings: ReadingSettings,
    context: DistContext,
    *,
    data: str | None,
    model: str,
    text: bool | None = None,
    without_captions: str = "",
) -> Path | EmbedCost:
    """Find the embeddings another step needs in its work directory, and make them where they are missing.

    Existing ones are taken whatever their batch size and precision.

    Args:
        text: Whether text embeddings are needed; None makes them where the data has captions.
        without_captions: How the step does without captions, for the error where text embeddings are needed and there are
            none.

    Returns:
        Folder of finished embeddings of this model over this data; in a dry run without them what they would cost.
    """
    name = with_default_tag(find_model(model))
    folder = choose_embeddings(settings.work, name)
    sidecar = context.on_rank0(read_embed_sidecar, folder)
    given = configured() if sidecar is None else {}
    wanted = given.get("text", sidecar is None) if text is None else text
    request = EmbedSettings.asked_by(settings, **given | {"data": data, "model": model, "text": wanted})
    if sidecar is not None:
        own = {field.name for field in dataclasses.fields(EmbedSettings)} - {"keys", "batch_size", "precision"}
        recorded = {name: getattr(sidecar.made, name) for name in own.intersection(sidecar.settings)}
        request = dataclasses.replace(request, **recorded | {"text": sidecar.made.text or bool(text)})
        if not request.text:  # how captions are read made no difference
            captions = {name: getattr(sidecar.made, name) for name in ("caption_key", "caption_lines")}
            request = dataclasses.replace(request, **captions)
    elif text is None and wanted:
        request = dataclasses.replace(request, text=context.on_rank0(choose_text, request, name))
    without_text = without_captions if text else embed_images_first(request, name)
    plan = context.on_rank0(make_plan, request, without_text)
    if plan.finished is not None:
        context.on_rank0(take_finished, plan, plan.finished)
        return folder
    from clipcid_cli.steps.embed.result import EmbedCost
    from clipcid_cli.steps.embed.run import embed_planned  # and with it what encodes

    result = embed_planned(plan, context)
    if isinstance(result, EmbedCost):
        flags = request.data_flags | {"work": settings.work, "text": None if request.text else False}
        embed = command_line("embed", data or "DATA", model=model, **flags)
        reporting.note(
            f"There are no embeddings of {name.spec} in {folder}, and this is what they would cost. Once they are made, "
            f"--dry-run estimates this step: {embed}"
        )
        return result
    return folder


def embed_images_first(request: EmbedSettings, name: ModelName) -> str:
    """Give the command for embeddings that a step without captions accepts; this run has begun ones with text.

    Finished ones are not replaced by it: it names another work directory.
    """
    data = () if request.data is None else (request.data,)
    flags: dict[str, Any] = {**request.data_flags, "work": request.work, "text": False}
    for flag in ("caption_column", "caption_key"):
        flags.pop(flag, None)
    if read_embed_sidecar(choose_embeddings(request.work, name)) is None:
        return f"Embed the images alone first: {command_line('embed', *data, model=name.spec, **flags, overwrite=True)}"
    embed = command_line("embed", *data, model=name.spec, **flags | {"work": "OTHER"})
    return (
        f"Embed the images alone into another work directory: {embed}\nThen give {flag_words(work='OTHER')} here too."
    )
