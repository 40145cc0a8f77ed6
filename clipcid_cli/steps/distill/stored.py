"""Stored embeddings of the teachers: found or made, opened, and checked against teachers and data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.names import ModelName, parse_model, read_width, with_default_tag
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.samples import MatchCounts, index_of
from clipcid_cli.steps.embed.request import ensure_embeddings
from clipcid_cli.steps.embeddings import advise_keys, compare_keys, open_teacher
from clipcid_cli.steps.models import choose_embeddings, embed_with, find_mismatch, find_model, validate_teacher
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL, configured

if TYPE_CHECKING:
    from clipcid_cli.steps.embed.result import EmbedCost


def losses_of_captions(settings: DistillSettings) -> list[str]:
    """List the losses of the run that need the teacher's embeddings of captions.

    Beside the teacher's text tower, and without ``--preset``, only those do that were typed: others are off where there
    are no such embeddings.
    """
    needing = [loss.name for loss in settings.losses if settings.needs_teacher_texts(loss)]
    return [name for name in needing if name in settings.typed_losses] if settings.may_drop_losses else needing


def drop_losses_of_captions(
    settings: DistillSettings, embeddings: Embeddings | None, dataset: Dataset
) -> DistillSettings:
    """Turn those losses off that need the teacher's rows of captions where there are none, and say so."""
    needing = [loss.name for loss in settings.losses if settings.needs_teacher_texts(loss)]
    lacking = None
    if settings.online_teacher:
        if not any(shard.with_captions for shard in index_of(dataset).records):
            lacking = f"{dataset.spec} has no captions"
    elif embeddings is not None and not embeddings.has_texts:
        lacking = f"{embeddings.folder} holds no embeddings of captions"
    if lacking is None or not needing:
        return settings
    typed = [name for name in needing if settings.typed_losses.get(name)]
    left = [loss.name for loss in settings.losses if loss.name not in needing]
    if typed or not left:
        raise ClipcidError(
            f"{lacking}, and they are needed by: {', '.join(typed or needing)}.",
            "Use losses of images alone, such as --loss fd=2, or data with captions.",
        )
    reporting.note(f"{lacking}: without {', '.join(needing)}, the run trains by {', '.join(left)} alone.")
    return dataclasses.replace(settings, loss=(*settings.loss, *(f"{name}=0" for name in needing)))


TeacherFolders = tuple[Path, ...]
"""The folder of each teacher's embeddings; none where no loss reads any."""


def _parse(teacher: str) -> ModelName:
    return with_default_tag(find_model(teacher))


def validate_teacher_names(settings: DistillSettings) -> None:
    """Refuse a teacher that is the name of no model."""
    for teacher in settings.teacher:
        _parse(teacher)


def flags_of_embeddings(settings: DistillSettings) -> dict[str, Any]:
    """Return the flags by which `cluster` takes the teachers' embeddings, which may not exist yet."""
    if settings.num_teachers == 1:
        return {"embeddings": settings.embeddings}
    folders = settings.embeddings
    if not folders:
        folders = tuple(choose_embeddings(settings.work, _parse(teacher)) for teacher in settings.teacher)
    return {"embeddings": folders, "teacher_weight": settings.teacher_weight}


def find_embeddings(settings: DistillSettings, context: DistContext) -> TeacherFolders | EmbedCost:
    """Find the teachers' embeddings, and make them where there are none; none when no loss needs them.

    Without ``--teacher`` it is the one whose embeddings the work directory holds.
    """
    if not settings.needs_teacher:
        return ()
    if settings.embeddings:
        return settings.embeddings
    if settings.online_teacher:
        return context.on_rank0(_find_of_online, settings)
    work = WorkDirectory(settings.work)
    teachers = settings.teacher
    if not teachers:
        try:
            return (context.on_rank0(work.find_embeddings),)
        except ClipcidError:
            if settings.data is None or work.has_embeddings():
                raise
        teachers = (DEFAULT_MODEL,)
        reporting.note(f"Teacher: {DEFAULT_MODEL}, the default.")
    folders = list[Path]()
    for teacher in teachers:
        embedded = _ensure_embeddings(settings, teacher, context)
        if not isinstance(embedded, Path):
            if teacher != teachers[-1]:
                reporting.note(f"That is the cost of {teacher} alone: the teachers after it are not estimated.")
            return embedded
        folders.append(embedded)
    return tuple(folders)


def _ensure_embeddings(settings: DistillSettings, teacher: str, context: DistContext) -> Path | EmbedCost:
    folder = choose_embeddings(settings.work, _parse(teacher))
    exists = context.on_rank0(lambda: read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar) is not None)
    if not exists:
        with_views = f"run: {embed_with(parse_model(teacher), settings)} --views 4"
        validate_views(settings, folder, configured().get("views", 0), with_views)
        if settings.report_to != "none" and not settings.dry_run:  # and before hours of embedding
            from clipcid_cli.formats.results.boards import validate_board

            context.on_rank0(validate_board, settings.report_to, quiet=settings.quiet)
    # Existing embeddings of images only may suffice; new ones are of captions too, if a text tower is trained on them.
    text = True if losses_of_captions(settings) or not (exists or settings.keeps_text_tower) else None
    alone = settings.without_captions
    return ensure_embeddings(settings, context, data=settings.data, model=teacher, text=text, without_captions=alone)


def _find_of_online(settings: DistillSettings) -> TeacherFolders:
    """Find stored embeddings of an online teacher, where there are any.

    They name it, and tell the axes of the shared space and how well it pairs images with captions.
    """
    work = WorkDirectory(settings.work)
    if settings.named_teacher is None:
        return (work.find_embeddings(),) if work.has_embeddings() else ()
    teacher = _parse(settings.named_teacher)
    folder = choose_embeddings(settings.work, teacher)
    sidecar = read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar)
    is_its = sidecar is not None and find_mismatch(sidecar.model, teacher) is None
    return (folder,) if is_its else ()


def choose_online(settings: DistillSettings, embeddings: Embeddings | None) -> ModelName:
    """Choose a teacher that runs alongside the student: the one named, else the embeddings', else the default one."""
    if settings.named_teacher is not None:
        return _parse(settings.named_teacher)
    if embeddings is None:
        return _parse(DEFAULT_MODEL)
    if embeddings.model is None:
        raise ClipcidError(f"{embeddings.folder} does not record which model made it.", "Name the --teacher.")
    return parse_model(embeddings.model.spec)


def open_stored(settings: DistillSettings, folders: TeacherFolders, work: Path | None) -> Embeddings:
    """Open the teachers' embeddings, check that they made them, and look for the captions that the losses need."""
    opened = [open_teacher(settings, folder, work) for folder in folders]
    if settings.needs_teacher and settings.teacher:
        for teacher, member in zip(settings.teacher, opened, strict=True):
            _validate_made_by(_parse(teacher), member, settings)
    embeddings = opened[0]
    if len(opened) > 1:
        from clipcid_cli.steps.several_teachers import join_teachers, note_missing_bias

        embeddings = join_teachers(settings, opened, work)
        note_missing_bias(settings.losses, opened)
    folder = embeddings.folder
    if embeddings.has_texts or settings.online_teacher:
        return embeddings
    needing = losses_of_captions(settings)
    if needing:
        raise ClipcidError(
            f"{folder} holds embeddings of images only, and captions are needed by: {', '.join(needing)}.",
            "Use losses that need one tower only: "
            + ", ".join(name for name, entry in LOSSES.items() if not settings.needs_teacher_texts(entry))
            + f"\nOr add a teacher that has captions: --embeddings {folder} --embeddings OTHER"
            + f"\nOr embed the captions too. {embeddings.embed_again(text=True)}",
        )
    reporting.note("They are of images only: losses use the teacher's image tower alone.")
    return embeddings


def _validate_made_by(teacher: ModelName, embeddings: Embeddings, settings: DistillSettings) -> None:
    """Refuse embeddings that another model made, as far as they tell."""
    folder = embeddings.folder
    if embeddings.sidecar is not None:
        fix = f"Omit --embeddings, or run: {embed_with(teacher, settings)}"
        if settings.num_teachers > 1:
            fix = f"Give --teacher in the order of --embeddings. {fix}"
        validate_teacher(f"embeddings in {folder}", embeddings.sidecar.model, teacher, fix)
    elif (width := read_width(teacher)) not in (None, embeddings.width):
        raise ClipcidError(
            f"The embeddings in {folder} have width {embeddings.width}; those of the teacher {teacher.spec} have {width}.",
            f"Name the model that made them with --teacher, or run: {embed_with(teacher, settings)}",
        )


def validate_matches(settings: DistillSettings, dataset: Dataset, embeddings: Embeddings, counts: MatchCounts) -> None:
    """Refuse embeddings that lack many of the samples to train on; count the samples that they lack otherwise."""
    if counts.without_embedding <= settings.max_bad_fraction * counts.candidates:
        if counts.without_embedding:
            lacking = f"{counts.without_embedding:,} of {counts.candidates:,} samples"
            reporting.note(
                f"Without an embedding in {embeddings.folder}: {lacking}, which are left out{_name_skipped(embeddings)}."
            )
        return
    at_fault = embeddings.part_that_lacks(counts.without_embedding)
    message = f"{counts.without_embedding:,} of {counts.candidates:,} samples have no embedding in {at_fault.folder}."
    advice = ""
    if counts.without_embedding == counts.candidates:
        message += f" {compare_keys(first_key(dataset), at_fault)}"
        advice = advise_keys(at_fault)
    raise ClipcidError(message, f"{advice}Give the data that was embedded, or {_embed_this_data(settings, at_fault)}")


def _embed_this_data(settings: DistillSettings, embeddings: Embeddings) -> str:
    """Say how the data to train on is embedded; embeddings of other data are not replaced for it."""
    sidecar = embeddings.sidecar
    if sidecar is None or settings.data in (None, sidecar.data.spec):
        return f"embed this data. {embeddings.embed_again()}"
    elsewhere = dataclasses.replace(settings, work=Path("OTHER"))
    return f"embed this data into another work directory: {embed_with(parse_model(sidecar.model.spec), elsewhere)}"


def _name_skipped(embeddings: Embeddings) -> str:
    """Say how many samples were skipped when they were embedded, and where they are listed; empty where none was."""
    listed = [f"{path} lists {count:,} that embed skipped" for path, count in embeddings.skipped().items() if count]
    return f"; {'; '.join(listed)}" if listed else ""


def first_key(dataset: Dataset) -> str:
    """Return the first key of the data, as an example."""
    index = index_of(dataset)
    return str(index.part(int(np.flatnonzero(index.sizes)[0])).keys[0])


def validate_views(settings: DistillSettings, folder: Path, views: int, with_views: str) -> None:
    """Refuse embeddings without views where these were asked for by name; `with_views` says how to make some."""
    if settings.views == "stored" and not views:
        raise ClipcidError(f"--views stored, but {folder} holds no views.", f"Omit --views stored, or {with_views}")
