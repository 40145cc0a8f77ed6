"""What `distill` reads: data, keep list, the teacher's embeddings and clusters, found and checked against one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.key_join import join_keys
from clipcid_cli.formats.output import fingerprint_file, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.loading import default_workers
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.distill.cluster_targets import join_clusters, refuse_old_clusters
from clipcid_cli.steps.distill.samples import Selection, UsableSamples, find_usable
from clipcid_cli.steps.distill.teacher_inputs import (
    TeacherInputs,
    join_teacher,
    named_teacher,
    needs_teacher_texts,
    open_teacher,
)
from clipcid_cli.steps.embed.ensure import ensure_embeddings
from clipcid_cli.steps.keep_list import AppliedKeepList, apply_keep_list
from clipcid_cli.steps.model_identity import is_of
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL


@dataclasses.dataclass(frozen=True)
class TrainingInputs:
    """Everything a run reads.

    Attributes:
        usable: The samples that have an image and a caption.
        keep_list: The keep list that was applied; None where all samples are used.
        teacher_inputs: The teacher's embeddings and clusters; None where no loss needs a teacher.
        fingerprints: Size and hash of each input file.
    """

    dataset: Dataset
    usable: UsableSamples
    training: Selection
    held_out: Selection
    keep_list: AppliedKeepList | None
    teacher_inputs: TeacherInputs | None
    fingerprints: list[dict[str, Any]]


def find_embeddings(settings: DistillSettings, machine: Machine, reporter: Reporter) -> Path | None:
    """Find the teacher's embeddings, and make them where there are none; None when no loss needs them.

    Without ``--teacher`` it is the one whose embeddings the work directory holds.

    Raises:
        ClipcidError: when they can neither be found nor made.
    """
    if not settings.needs_teacher:
        return None
    if settings.embeddings is not None:
        return settings.embeddings
    if settings.online_teacher:
        return machine.on_main(lambda: _find_for_axes(settings))
    teacher = settings.teacher
    if teacher is None:
        try:
            return machine.on_main(WorkDirectory(settings.work).find_embeddings)
        except ClipcidError:
            if settings.data is None or any((settings.work / "embeddings").glob("*/embed.json")):
                raise
        teacher = DEFAULT_MODEL
        reporter.note(f"Teacher: {teacher}, the default.")
    # Existing embeddings of images only may suffice; new ones are of captions too.
    folder = WorkDirectory(settings.work).embeddings(with_default_tag(parse_model(teacher)).slug)
    exists = machine.on_main(lambda: read_sidecar(sidecar_path(folder, "embed")) is not None)
    text = True if needs_teacher_texts(settings) or not exists else None
    return ensure_embeddings(settings, machine, reporter, data=settings.data, model=teacher, text=text)


def _find_for_axes(settings: DistillSettings) -> Path | None:
    """Find stored embeddings of an online teacher, in which only the axes of the shared space are found; None for none."""
    teacher = named_teacher(settings)
    try:
        folder = WorkDirectory(settings.work).find_embeddings(None if teacher is None else teacher.slug)
    except ClipcidError:
        return None
    sidecar = read_sidecar(sidecar_path(folder, "embed"))
    of_another = teacher is not None and (sidecar is None or not is_of(sidecar["model"], teacher))
    return None if of_another or settings.teacher_space == "project" else folder


def find_inputs(settings: DistillSettings, embeddings_folder: Path | None, reporter: Reporter) -> TrainingInputs:
    """Find, open and join the inputs, and report which were taken.

    Args:
        embeddings_folder: What `find_embeddings` found.

    Raises:
        ClipcidError: when one is missing, or they are of different data or teachers; the fix names the command.
    """
    work = WorkDirectory(settings.work)
    teacher = named_teacher(settings) if settings.needs_teacher else None
    embeddings = None
    if embeddings_folder is not None:
        embeddings = open_teacher(settings, embeddings_folder, teacher, reporter)
    dataset = _open_data(settings, work, embeddings, reporter)
    usable = find_usable(dataset, settings.max_bad_fraction)
    fingerprints = dataset.fingerprints()
    selected, held_out = usable.split(settings.val_fraction)
    keep_list = apply_keep_list(
        settings.keep_list,
        work,
        usable.keys,
        samples="samples",
        source=dataset.spec,
        max_missing=settings.max_bad_fraction,
        reporter=reporter,
    )
    if keep_list is not None:
        selected &= keep_list.is_kept
        fingerprints.append(fingerprint_file(keep_list.path))
    teacher_inputs = None
    if settings.needs_teacher:
        if settings.online_teacher:
            teacher_inputs = _choose_online(teacher, embeddings, usable, reporter)
        else:
            assert embeddings is not None, "find_embeddings made them"
            teacher_inputs = join_teacher(settings, embeddings, dataset, usable, selected, reporter)
            selected &= teacher_inputs.embedding_rows >= 0
        teacher_inputs = join_clusters(settings, teacher_inputs, usable, selected, reporter)
        if keep_list is not None and teacher_inputs.clusters is not None:
            refuse_old_clusters(teacher_inputs.clusters, keep_list.path)
        fingerprints += teacher_inputs.fingerprints()
    return TrainingInputs(
        dataset,
        usable,
        usable.selection.narrow(selected),
        usable.selection.narrow(held_out),
        keep_list,
        teacher_inputs,
        fingerprints,
    )


def _choose_online(
    teacher: ModelName | None, embeddings: Embeddings | None, usable: UsableSamples, reporter: Reporter
) -> TeacherInputs:
    """Choose a teacher that runs alongside the student: the one named, else the embeddings', else the default one.

    Raises:
        ClipcidError: when embeddings of another tool do not name their model.
    """
    if teacher is None and embeddings is not None:
        if embeddings.sidecar is None:
            raise ClipcidError(f"{embeddings.folder} does not record which model made it.", "Name the --teacher.")
        teacher = parse_model(embeddings.sidecar["model"]["spec"])
    teacher = teacher or with_default_tag(parse_model(DEFAULT_MODEL))
    reporter.note(f"Teacher: {teacher.spec}, run alongside the student on the same views and captions.")
    rows = np.full(len(usable.keys), -1) if embeddings is None else join_keys(usable.keys, embeddings.keys)
    return TeacherInputs(embeddings, rows, online=teacher)


def _open_data(
    settings: DistillSettings, work: WorkDirectory, embeddings: Embeddings | None, reporter: Reporter
) -> Dataset:
    if settings.data is not None:
        columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
        dataset = open_dataset(settings.data, settings.keys, columns, work.indexes)
    else:
        dataset = open_described(work.find_data(None if embeddings is None else embeddings.folder), work.indexes)
        reporter.note(f"Data: {dataset.spec}, from which the embeddings were made.")
    if settings.dry_run:  # which writes nothing: shards that are not in an index are listed here and now
        return dataset
    # By this process and its workers, while the others wait for what is found; `embed` has mostly done it before.
    alone = Machine(0, 1, 0, torch.device("cpu"))
    return ensure_index(dataset, alone, default_workers() if settings.workers is None else settings.workers, reporter)
