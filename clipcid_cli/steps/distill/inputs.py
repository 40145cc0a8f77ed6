"""What `distill` reads: data, samples, keep list, teacher and clusters, found and checked against one another."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Columns, Dataset, open_dataset, open_described
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.matched_samples import HELD_OUT, TRAINING, SampleRows, open_rows
from clipcid_cli.formats.sidecar import EmbedSidecar, RepairFigures, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.names import parse_model, with_default_tag
from clipcid_cli.steps.data_index import cache_shards, index_alone
from clipcid_cli.steps.distill.clusters import ChosenClusters, find_clusters, use_clusters
from clipcid_cli.steps.distill.samples import Sources, UsableSamples, count_usable, find_samples, index_of
from clipcid_cli.steps.distill.stored_teacher import (
    OnlineTeacher,
    StoredTeacher,
    choose_online,
    losses_of_captions,
    named_teacher,
    open_stored,
    use_stored,
    validate_keys,
    validate_requested,
)
from clipcid_cli.steps.embed.run import ensure_embeddings
from clipcid_cli.steps.keep_list import ChosenKeepList, choose_keep_list
from clipcid_cli.steps.models import find_mismatch
from clipcid_cli.steps.repair import repair_teacher
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything a run reads.

    Attributes:
        keep_list: None where all samples are used.
        teacher: None where no loss needs one.
        repair: What was found of the repair of the teacher; None where nothing was judged.
        clusters: Those of the teacher; None where no loss needs them.
    """

    dataset: Dataset
    usable: UsableSamples
    training: SampleRows
    held_out: SampleRows
    keep_list: ChosenKeepList | None
    teacher: StoredTeacher | OnlineTeacher | None
    repair: RepairFigures | None
    clusters: ChosenClusters | None
    fingerprints: list[FileRecord]

    @property
    def stored(self) -> StoredTeacher | None:
        """The teacher where it is one."""
        return self.teacher if isinstance(self.teacher, StoredTeacher) else None

    @property
    def trust(self) -> float:
        """How far the teacher's pairing of images with captions is to be trusted, in (0, 1]."""
        return 1.0 if self.repair is None else self.repair.trust

    @property
    def embeddings(self) -> Embeddings | None:
        """The teacher's stored embeddings, where there are any."""
        return None if self.teacher is None else self.teacher.embeddings

    def refs(self, samples: SampleRows, rows: npt.NDArray[np.int64]) -> list[SampleRef]:
        """Return where samples are, by their rows among `samples`."""
        shards = samples.shard_of(rows).tolist()
        places = samples.column("places")[rows].tolist()
        parts = {shard: index_of(self.dataset).part(shard) for shard in set(shards)}
        return [SampleRef(parts[shard], place) for shard, place in zip(shards, places, strict=True)]

    def num_extra_texts(self, batch_size: int) -> int:
        """Return how many further texts a step has, over all processes."""
        extra = None if self.stored is None else self.stored.extra_texts
        if extra is None:
            return 0
        return batch_size if extra.number is None else extra.number


def find_embeddings(settings: DistillSettings, context: DistContext, reporter: Reporter) -> Path | None:
    """Find the teacher's embeddings, and make them where there are none; None when no loss needs them.

    Without ``--teacher`` it is the one whose embeddings the work directory holds.
    """
    if not settings.needs_teacher:
        return None
    if settings.embeddings is not None:
        return settings.embeddings
    if settings.online_teacher:
        return context.on_rank0(lambda: _find_of_online(settings))
    work = WorkDirectory(settings.work)
    teacher = settings.teacher
    if teacher is None:
        try:
            return context.on_rank0(work.find_embeddings)
        except ClipcidError:
            if settings.data is None or work.has_embeddings():
                raise
        teacher = DEFAULT_MODEL
        reporter.note(f"Teacher: {teacher}, the default.")
    folder = work.embeddings(with_default_tag(parse_model(teacher)).slug)
    exists = context.on_rank0(lambda: read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar) is not None)
    if not exists:
        validate_requested(settings, folder, None, model=teacher)
    # Existing embeddings of images only may suffice; new ones are of captions too.
    text = True if losses_of_captions(settings) or not exists else None
    return ensure_embeddings(settings, context, reporter, data=settings.data, model=teacher, text=text)


def _find_of_online(settings: DistillSettings) -> Path | None:
    """Find stored embeddings of an online teacher, where there are any.

    They name it, and tell the axes of the shared space and whether it is repaired.
    """
    work, teacher = WorkDirectory(settings.work), named_teacher(settings)
    if teacher is None:
        return work.find_embeddings() if work.has_embeddings() else None
    folder = work.embeddings(teacher.slug)
    sidecar = read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar)
    is_its = sidecar is not None and find_mismatch(sidecar.model, teacher) is None
    return folder if is_its else None


def find_inputs(settings: DistillSettings, folder: Path | None, scratch: Path | None, reporter: Reporter) -> Inputs:
    """Find, open and match the inputs, and report which were taken.

    Args:
        folder: The embeddings that `find_embeddings` found.
        scratch: Where a dry run keeps what a run keeps in the work directory.
    """
    work = WorkDirectory(settings.work)
    embeddings = None
    if folder is not None:
        cache = work.fingerprints
        if scratch is not None:  # a dry run adds to a copy
            with suppress(FileNotFoundError):
                shutil.copy(cache, scratch)
            cache = scratch / cache.name
        embeddings = open_stored(settings, folder, cache, reporter)
    dataset = _open_data(settings, embeddings, scratch, reporter)
    usable = count_usable(dataset, settings.max_bad_fraction)
    keep_list = choose_keep_list(settings.keep_list, work, "samples", settings.max_bad_fraction, reporter)
    listed = None if keep_list is None else keep_list.path
    online = choose_online(settings, embeddings) if settings.online_teacher else None
    if online is None and embeddings is not None:
        validate_keys(embeddings, dataset)
    clusters = find_clusters(settings, embeddings, online, listed)

    fingerprints = dataset.fingerprints() + ([] if listed is None else [record(listed)])
    sources = Sources(listed, embeddings, online is None, clusters)
    matched, counts = find_samples(settings, dataset, sources, fingerprints, scratch, reporter)
    if counts.bad_rows and sources.required:
        reporter.warn(f"{counts.bad_rows:,} rows of the embeddings are zero or not finite: their samples are left out.")
    if keep_list is not None:
        missing = usable.total - counts.listed
        keep_list.report(dataset.spec, usable.total, kept=counts.kept, missing=missing, reporter=reporter)

    repair = None
    if embeddings is not None:
        embeddings, repair = repair_teacher(settings, embeddings, reporter)
    teacher: StoredTeacher | OnlineTeacher | None = None
    chosen = None
    if online is not None:
        teacher = dataclasses.replace(online, embeddings=embeddings)
        reporter.note(f"Teacher: {online.name.spec}, run alongside the student on the same views and captions.")
        if embeddings is None and settings.repair != "none":
            reporter.note("It is left as it is: a repair is fitted to stored embeddings, of which there are none.")
    elif embeddings is not None:
        teacher = use_stored(settings, embeddings, counts, reporter)
    if teacher is not None:
        fingerprints += teacher.fingerprints()
        if clusters is not None:
            chosen = use_clusters(settings, clusters, teacher, counts, reporter)
            fingerprints += chosen.fingerprints()
    training, held_out = open_rows(matched, TRAINING), open_rows(matched, HELD_OUT)
    return Inputs(dataset, usable, training, held_out, keep_list, teacher, repair, chosen, fingerprints)


def _open_data(
    settings: DistillSettings, embeddings: Embeddings | None, scratch: Path | None, reporter: Reporter
) -> Dataset:
    work = WorkDirectory(settings.work)
    if settings.data is not None:
        columns = Columns(settings.image_column, settings.caption_column, settings.key_column)
        dataset = open_dataset(
            settings.data, settings.keys, columns, work.indexes, caption_lines=settings.caption_lines
        )
    else:
        dataset = open_described(work.find_data(None if embeddings is None else embeddings.folder), work.indexes)
        reporter.note(f"Data: {dataset.spec}, from which the embeddings were made.")
    if scratch is not None and dataset.index is None:
        dataset = dataclasses.replace(dataset, index_folder=scratch / "index")
    # `embed` has mostly done it before.
    return cache_shards(index_alone(dataset, settings.workers, reporter), settings.cache_size)
