"""Embeddings that another step needs: those of its work directory, made where they are missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcid_cli.errors import ClipcidError, command_line, flag_words
from clipcid_cli.formats.embeddings.sidecar import read_embed_sidecar
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.names import ModelName, with_default_tag
from clipcid_cli.steps import reporting
from clipcid_cli.steps.embed.plan import EmbedPlan, choose_text, make_plan, take_finished
from clipcid_cli.steps.models import choose_embeddings, find_model
from clipcid_cli.steps.settings.embed import VIEW_KINDS, EmbedSettings, configured
from clipcid_cli.steps.settings.shared import ReadingSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.embed.result import EmbedCost

# How `--view-kind strong` drew crops, which is no longer a kind.
_STRONG = {"crop_scale": 0.3, "color_jitter": 0.4, "gray_probability": 0.2}


class _RecordedSettings(EmbedSettings):
    """Settings of embeddings that are there, whose views may be of kinds that only earlier versions drew."""

    def _validate_view_kinds(self) -> None:
        """Any kind may be taken; `_make_plan` refuses to draw some."""


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
    kind = EmbedSettings if sidecar is None else _RecordedSettings
    request = kind.asked_by(settings, **given | {"data": data, "model": model, "text": wanted})
    if sidecar is not None:
        own = {field.name for field in dataclasses.fields(EmbedSettings)} - {"keys", "batch_size", "precision"}
        recorded = {name: getattr(sidecar.made, name) for name in own.intersection(sidecar.settings)}
        request = dataclasses.replace(request, **recorded | {"text": sidecar.made.text or bool(text)})
        if not request.text:  # how captions are read made no difference
            captions = {name: getattr(sidecar.made, name) for name in ("caption_key", "caption_lines")}
            request = dataclasses.replace(request, **captions)
    elif text is None and wanted:
        request = dataclasses.replace(request, text=context.on_rank0(choose_text, request, name))
    plan = context.on_rank0(_make_plan, request, name, without_captions if text else None)
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


def _make_plan(request: EmbedSettings, name: ModelName, without_captions: str | None) -> EmbedPlan:
    """Make the plan, and refuse to add to embeddings whose views are of a kind that is no longer drawn."""
    without_text = embed_images_first(request, name) if without_captions is None else without_captions
    plan = make_plan(request, without_text)
    no_longer_drawn = [kind for kind in request.view_kinds if kind not in VIEW_KINDS]
    if plan.finished is None and no_longer_drawn:
        raise ClipcidError(
            f"{plan.folder} does not hold all embeddings of {plan.dataset.spec} with {name.spec}, and its views are of a "
            f"kind that is no longer drawn: {', '.join(no_longer_drawn)}.",
            f"Embed all anew, with such crops: {_embed_anew(request, name)}",
        )
    return plan


def _embed_anew(request: EmbedSettings, name: ModelName) -> str:
    """Return the command that replaces embeddings whose views are of a kind that is no longer drawn."""
    data = () if request.data is None else (request.data,)
    flags: dict[str, Any] = {**request.data_flags, "work": request.work, "text": None if request.text else False}
    flags |= {"views": request.views, "text_variants": request.text_variants or None, **_STRONG}
    flags["view_kind"] = tuple(kind if kind in VIEW_KINDS else "crop" for kind in request.view_kinds)
    return command_line("embed", *data, model=name.spec, **flags, overwrite=True)


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
