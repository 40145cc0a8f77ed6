"""What `distill` reads: data, keep list, the teacher, clusters; found, and checked against one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.algorithms.losses.registry import LossEntry, Weight
from clipcid_cli.formats.data.dataset import Dataset, open_described
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.manifest import validate_embedded
from clipcid_cli.formats.embeddings.sidecar import recorded_data
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.matched_samples import HELD_OUT, TRAINING, SampleRows, open_rows
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.steps import reporting
from clipcid_cli.steps.data_index import index_alone, note_captions
from clipcid_cli.steps.distill.samples import Sources, UsableSamples, count_usable, find_samples, index_of
from clipcid_cli.steps.distill.stored import (
    TeacherFolders,
    choose_online,
    drop_losses_of_captions,
    first_key,
    open_stored,
)
from clipcid_cli.steps.distill.teachers import Judgement, Teacher, choose_losses, choose_teacher, judge_teacher
from clipcid_cli.steps.keep_list import choose_keep_list
from clipcid_cli.steps.open_data import open_named
from clipcid_cli.steps.settings.distill import DistillSettings

if TYPE_CHECKING:
    from clipcid_cli.steps.chosen_keep_list import ChosenKeepList
    from clipcid_cli.steps.distill.clusters import ChosenClusters


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything a run reads."""

    settings: DistillSettings  # without losses that need captions where there are none
    # Of the run: those of the settings, or others (`choose_losses`), with other weights.
    losses: dict[LossEntry, Weight]
    dataset: Dataset
    usable: UsableSamples
    training: SampleRows
    held_out: SampleRows
    keep_list: ChosenKeepList | None  # None where all samples are used
    teacher: Teacher
    clusters: ChosenClusters | None  # those of the teacher; None where no loss needs them
    fingerprints: list[FileRecord]

    def refs(self, samples: SampleRows, rows: npt.NDArray[np.int64]) -> list[SampleRef]:
        """Return where samples are, by their rows among `samples`."""
        shards = samples.shard_of(rows).tolist()
        places = samples.column("places")[rows].tolist()
        parts = {shard: index_of(self.dataset).part(shard) for shard in set(shards)}
        return [SampleRef(parts[shard], place) for shard, place in zip(shards, places, strict=True)]

    def held_out_keys(self) -> pa.ChunkedArray:
        """Return the keys of the samples that are held out, in order."""
        places = self.held_out.column("places")
        chunks = list[pa.Array]()
        for shard in np.flatnonzero(self.held_out.sizes).tolist():
            first, end = self.held_out.bounds(shard)
            keys = index_of(self.dataset).part(shard).keys
            chunks += keys.take(pa.array(places[first:end])).chunks
        return pa.chunked_array(chunks, pa.string())


def find_inputs(settings: DistillSettings, folders: TeacherFolders, scratch: Path | None) -> Inputs:
    """Find, open and match the inputs, and report which were taken.

    Args:
        folders: The embeddings that `find_embeddings` found.
        scratch: Where a dry run keeps what a run keeps in the work directory.
    """
    work = WorkDirectory(settings.work)
    embeddings = None
    if folders:
        embeddings = open_stored(settings, folders, scratch or work.path)
    dataset = _open_data(settings, folders, embeddings, scratch)
    lacks_texts = embeddings is not None and not embeddings.has_texts and not settings.online_teacher
    if settings.keeps_text_tower or lacks_texts:
        settings = drop_losses_of_captions(settings, embeddings, dataset)
    captions = settings.shows_captions
    may_lack = bool(settings.student_caption_key)  # few data are translated whole
    alone = settings.without_captions
    usable = count_usable(
        dataset, settings.max_bad_fraction, captions=captions, may_lack_captions=may_lack, without_captions=alone
    )
    keep_list = choose_keep_list(settings.keep_list, work, "samples", settings.max_bad_fraction)
    listed = None if keep_list is None else keep_list.path
    online = choose_online(settings, embeddings) if settings.online_teacher else None
    if online is None and embeddings is not None:
        embeddings.validate_made_as(dataset, captions=not settings.student_caption_key)
    clusters = None
    if settings.needs_clusters:
        from clipcid_cli.steps.distill.clusters import choose_clusters, find_clusters

        clusters = find_clusters(settings, embeddings, online, listed)

    fingerprints = dataset.fingerprints() + ([] if listed is None else [record(listed)])
    sources = Sources(listed, embeddings, online is None, clusters, captions)
    matched, counts = find_samples(settings, dataset, sources, fingerprints, scratch)
    if embeddings is not None and counts.bad_rows and sources.required:
        reporting.warn(
            f"{counts.bad_rows:,} rows of the embeddings are {embeddings.unusable}: their samples are left out."
        )
    if keep_list is not None:
        missing = usable.total - counts.listed
        keep_list.report(dataset.spec, usable.total, kept=counts.kept, missing=missing, key=first_key(dataset))

    judgement = Judgement()
    if embeddings is not None:
        embeddings, judgement = judge_teacher(settings, embeddings)
    losses = choose_losses(settings, judgement)
    teacher = choose_teacher(settings, losses, embeddings, judgement, online, dataset, counts)
    fingerprints += teacher.fingerprints()
    chosen = None
    if clusters is not None:
        several_captions = counts.several_captions > 0 and not teacher.first_captions
        chosen = choose_clusters(settings, clusters, teacher, counts, several_captions=several_captions)
        fingerprints += chosen.fingerprints()
    return Inputs(
        settings=settings,
        losses=losses,
        dataset=dataset,
        usable=usable,
        training=open_rows(matched, TRAINING),
        held_out=open_rows(matched, HELD_OUT),
        keep_list=keep_list,
        teacher=teacher,
        clusters=chosen,
        fingerprints=fingerprints,
    )


def _open_data(
    settings: DistillSettings, folders: TeacherFolders, embeddings: Embeddings | None, scratch: Path | None
) -> Dataset:
    work = WorkDirectory(settings.work)
    if settings.data is not None:
        dataset = open_named(settings.read_for_student(), settings.data, work.indexes)
        for embedded in folders:
            validate_embedded(embedded, dataset)
    else:
        folder = work.find_embeddings() if embeddings is None else embeddings.folder
        described = recorded_data(folder)
        if settings.student_caption_key:
            described = msgspec.structs.replace(described, caption_key=settings.student_caption_key)
        dataset = open_described(described, work.indexes, **settings.trust)
        for embedded in folders or (folder,):
            validate_embedded(embedded, dataset)
        reporting.note(f"Data: {dataset.spec}, from which the embeddings were made.")
    if scratch is not None and dataset.index is None:
        dataset = dataclasses.replace(dataset, index_folder=scratch / "index")
    dataset = index_alone(dataset, settings.workers)  # `embed` has mostly done it before
    note_captions(dataset)
    if any(shard.is_streamed for shard in dataset.shards):
        from clipcid_cli.steps.shard_copies import cache_shards

        dataset = cache_shards(dataset, settings.cache_size)
    return dataset
