"""What `distill` reads: data, keep list, the teacher's embeddings and clusters, found and checked against one another."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.data.index import lock_index
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import find_output, open_output
from clipcid_cli.formats.results.clusters import TABLE
from clipcid_cli.formats.results.matched_samples import STEP, SampleRows, matched_folder
from clipcid_cli.formats.sidecar import Sidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.names import ModelName, parse_model, with_default_tag
from clipcid_cli.runtime.pipeline import default_workers
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.data_index import cache_shards, ensure_index
from clipcid_cli.steps.distill.augmented.extra_texts import ExtraTexts
from clipcid_cli.steps.distill.cluster_targets import find_clusters, refuse_old_clusters, use_clusters
from clipcid_cli.steps.distill.samples import (
    MatchedSamples,
    Sources,
    UsableSamples,
    count_usable,
    index_of,
    match_samples,
)
from clipcid_cli.steps.distill.teacher_inputs import (
    TeacherInputs,
    check_keys,
    named_teacher,
    open_teacher,
    use_stored,
)
from clipcid_cli.steps.keep_list import ChosenKeepList, choose_keep_list, report_keep_list
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL


@dataclasses.dataclass(frozen=True)
class TrainingInputs:
    """Everything a run reads.

    Attributes:
        usable: How many samples have an image and a caption.
        training: The samples to train on.
        held_out: Those held out.
        keep_list: The keep list; None where all samples are used.
        teacher_inputs: The teacher's embeddings and clusters; None where no loss needs a teacher.
        fingerprints: What each input file is known by.
    """

    dataset: Dataset
    usable: UsableSamples
    training: SampleRows
    held_out: SampleRows
    keep_list: ChosenKeepList | None
    teacher_inputs: TeacherInputs | None
    fingerprints: list[FileRecord]

    @property
    def text_variants(self) -> TextVariants | None:
        """The embedded variants of captions that are shown; None for none."""
        return None if self.teacher_inputs is None else self.teacher_inputs.text_variants

    @property
    def extra_texts(self) -> ExtraTexts | None:
        """Further texts for the text tower; None without any."""
        return None if self.teacher_inputs is None else self.teacher_inputs.extra_texts


def find_inputs(
    settings: DistillSettings, embeddings_folder: Path | None, scratch: Path | None, reporter: Reporter
) -> TrainingInputs:
    """Find, open and match the inputs, and report which were taken.

    Args:
        embeddings_folder: What `find_embeddings` found.
        scratch: Folder for what a run keeps in the work directory, which a dry run leaves as it is.
    """
    work = WorkDirectory(settings.work)
    teacher = named_teacher(settings) if settings.needs_teacher else None
    embeddings = None
    if embeddings_folder is not None:
        cache = work.fingerprints if scratch is None else _copy_fingerprints(work, scratch)
        embeddings = open_teacher(settings, embeddings_folder, teacher, cache, reporter)
    dataset = _open_data(settings, work, embeddings, scratch, reporter)
    usable = count_usable(dataset, settings.max_bad_fraction)
    keep_list = choose_keep_list(settings.keep_list, work, "samples", reporter)
    if settings.online_teacher:
        teacher = _choose_online(teacher, embeddings)
    elif embeddings is not None:
        check_keys(embeddings, dataset)
    online = teacher if settings.online_teacher else None
    clusters = find_clusters(settings, embeddings, online)
    if clusters is not None and keep_list is not None:
        refuse_old_clusters(clusters, keep_list.path, settings.work)
    fingerprints = dataset.fingerprints()
    if keep_list is not None:
        fingerprints.append(record(keep_list.path))
    sources = Sources(None if keep_list is None else keep_list.path, embeddings, online is None, clusters)
    matched = _find_samples(settings, dataset, sources, fingerprints, scratch, reporter)
    counts, teacher_inputs = matched.counts, None
    if counts.bad_rows and sources.required:
        reporter.warn(f"{counts.bad_rows:,} rows of the embeddings are zero or not finite: their samples are left out.")
    if keep_list is not None:
        report_keep_list(
            keep_list.path,
            kept=counts.kept,
            missing=usable.total - counts.listed,
            total=usable.total,
            samples="samples",
            source=dataset.spec,
            max_missing=settings.max_bad_fraction,
            reporter=reporter,
        )
    if online is not None:
        reporter.note(f"Teacher: {online.spec}, run alongside the student on the same views and captions.")
        teacher_inputs = TeacherInputs(embeddings, matched.training, online=online)
    elif embeddings is not None:
        teacher_inputs = use_stored(settings, embeddings, matched.training, counts, reporter)
    if teacher_inputs is not None:
        if clusters is not None:
            teacher_inputs = use_clusters(settings, teacher_inputs, clusters, counts, reporter)
        fingerprints += teacher_inputs.fingerprints()
    return TrainingInputs(dataset, usable, matched.training, matched.held_out, keep_list, teacher_inputs, fingerprints)


def _find_samples(
    settings: DistillSettings,
    dataset: Dataset,
    sources: Sources,
    fingerprints: list[FileRecord],
    scratch: Path | None,
    reporter: Reporter,
) -> MatchedSamples:
    """Open the samples of the run, matched by an earlier start or another run of the same inputs; else match them now.

    Args:
        fingerprints: Those of the data and the keep list.
        scratch: Where a dry run writes them.
    """
    assert dataset.index_folder is not None, "opened with a folder for the index"
    records = index_of(dataset).records
    content = list(fingerprints)
    if sources.embeddings is not None:
        content += sources.embeddings.fingerprints([Kind.TEXTS, Kind.FURTHER])
    if sources.clusters is not None:
        content.append(record(sources.clusters.folder / TABLE))
    identity = {
        # Keys of foreign embeddings may be made of the files' names.
        "files": [[Path(each.path).name, each.size, each.hash] for each in content],
        # Captions in files of their own change without a shard's file; with `--keys shard` the names are in the keys.
        "shards": [
            [shard.name, *record.stamp, record.samples, record.with_captions]
            for shard, record in zip(dataset.shards, records, strict=True)
        ],
        "kinds": [sources.keep_list is not None, sources.embeddings is not None, sources.clusters is not None],
        "required": sources.required,
        "keys": settings.keys,
        "val_fraction": settings.val_fraction,
    }
    folder = matched_folder(dataset.index_folder, identity)
    wanted: dict[str, Any] = {"settings": {"matched": folder.name}, "inputs": [], "overwrite": True}
    matched = find_output(folder, STEP, Sidecar, **wanted).finished
    if matched is None or (scratch is None and any(folder.glob(f".{STEP}-*"))):  # what a killed run left
        if scratch is not None:
            folder = matched_folder(scratch, identity)
        with lock_index(folder.parent):
            matched = find_output(folder, STEP, Sidecar, **wanted).finished  # another run may just have made it
            if matched is None:
                shutil.rmtree(folder, ignore_errors=True)  # damaged, or begun by a run that was killed
            with open_output(
                folder, STEP, Sidecar, **wanted
            ) as output:  # which removes what is left beside a finished one
                if matched is None:
                    output.start()
                    found = match_samples(dataset, sources, settings.val_fraction, output.work, reporter)
                    outputs = [record(path, output.work) for path in sorted(output.work.glob("*.npy"))]
                    matched = output.commit(counts=dataclasses.asdict(found.counts), seconds={}, outputs=outputs)
    return MatchedSamples.open(folder, matched.counts)


def _choose_online(teacher: ModelName | None, embeddings: Embeddings | None) -> ModelName:
    """Choose a teacher that runs alongside the student: the one named, else the embeddings', else the default one."""
    if teacher is None and embeddings is not None:
        if embeddings.sidecar is None:
            raise ClipcidError(f"{embeddings.folder} does not record which model made it.", "Name the --teacher.")
        teacher = parse_model(embeddings.sidecar.model.spec)
    return teacher or with_default_tag(parse_model(DEFAULT_MODEL))


def _copy_fingerprints(work: WorkDirectory, scratch: Path) -> Path:
    """Copy the table of fingerprints for a dry run, which adds to its copy."""
    with suppress(FileNotFoundError):
        shutil.copy(work.fingerprints, scratch)
    return scratch / work.fingerprints.name


def _open_data(
    settings: DistillSettings,
    work: WorkDirectory,
    embeddings: Embeddings | None,
    scratch: Path | None,
    reporter: Reporter,
) -> Dataset:
    if settings.data is not None:
        columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
        dataset = open_dataset(settings.data, settings.keys, columns, work.indexes)
    else:
        dataset = open_described(work.find_data(None if embeddings is None else embeddings.folder), work.indexes)
        reporter.note(f"Data: {dataset.spec}, from which the embeddings were made.")
    if scratch is not None and dataset.index is None:
        dataset = dataclasses.replace(dataset, index_folder=scratch / "index")
    # By this process and its workers, while the others wait for what is found; `embed` has mostly done it before.
    alone = Machine(0, 1, 0, torch.device("cpu"))
    workers = default_workers(alone.device) if settings.workers is None else settings.workers
    return cache_shards(ensure_index(dataset, alone, workers, reporter), settings.cache_size)
