"""What `distill` reads: data, keep list, the teacher's embeddings, clusters; found, and checked against one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset, open_described
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Kind, Rows
from clipcid_cli.formats.embeddings.sidecar import EmbedSidecar, recorded_data
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.boards import validate_board
from clipcid_cli.formats.results.matched_samples import HELD_OUT, TRAINING, SampleRows, open_rows
from clipcid_cli.formats.results.repair import PairingFigures, RepairFigures
from clipcid_cli.formats.sidecar import read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.names import ModelName, parse_model, read_width, with_default_tag
from clipcid_cli.steps import reporting
from clipcid_cli.steps.data_index import index_alone, note_captions, open_named
from clipcid_cli.steps.distill.clusters import ChosenClusters, find_clusters, use_clusters
from clipcid_cli.steps.distill.extra_texts import ExtraTexts, find_extra_texts
from clipcid_cli.steps.distill.samples import (
    MatchCounts,
    Sources,
    UsableSamples,
    count_usable,
    find_samples,
    index_of,
)
from clipcid_cli.steps.embed.augmented import Views
from clipcid_cli.steps.embed.request import ensure_embeddings
from clipcid_cli.steps.embed.result import EmbedCost
from clipcid_cli.steps.embeddings import advise_keys, compare_keys, open_teachers
from clipcid_cli.steps.keep_list import ChosenKeepList, choose_keep_list
from clipcid_cli.steps.models import choose_embeddings, embed_with, find_mismatch, validate_teacher
from clipcid_cli.steps.repair import describe_pairing, judge_pairing, repair_teacher
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL, configured
from clipcid_cli.steps.shard_copies import cache_shards

# Another tool's views may have any crop and colours.
_ANY = Augmentation(crop_scale=0.08, color_jitter=1.0, gray_probability=1.0)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything a run reads."""

    dataset: Dataset
    usable: UsableSamples
    training: SampleRows
    held_out: SampleRows
    keep_list: ChosenKeepList | None  # None where all samples are used
    # The teacher's, repaired where that is better; None where there are none. Beside a teacher that runs alongside the
    # student they only tell the axes of the shared space, and its repair.
    embeddings: Embeddings | None
    # The teacher that runs alongside the student; None where stored rows teach, or nothing does.
    online: ModelName | None
    num_views: int  # stored views of each image that are replayed, 0 for none
    first_captions: bool  # whether a sample may only show its first caption, the only one that is embedded
    extra_texts: ExtraTexts | None
    repair: RepairFigures | None  # what was found of the repair of the teacher; None where nothing was judged
    pairing: PairingFigures | None  # how well the teacher knows the data; None where nothing was judged
    trust: float  # how far the teacher's pairing of images with captions is to be trusted, in [0, 1]
    clusters: ChosenClusters | None  # those of the teacher; None where no loss needs them
    fingerprints: list[FileRecord]

    @property
    def stored(self) -> Embeddings | None:
        """The embeddings, where they teach."""
        return self.embeddings if self.online is None else None

    def augmentation(self, chosen: Augmentation) -> Augmentation:
        """Return how images are augmented: as the strongest of the stored views were, else as chosen."""
        if self.stored is None or not self.num_views:
            return chosen
        if self.stored.sidecar is None:
            return _ANY
        made = self.stored.sidecar.made
        drawn = Augmentation(made.crop_scale, made.color_jitter, made.gray_probability)
        return Views(self.num_views, made.view_kind, drawn, made.seed).strongest

    def teacher_rows(self) -> dict[Kind, Rows]:
        """Map the stored rows of what samples show."""
        if self.stored is None:
            return {}
        kinds = [Kind.IMAGES, *kinds_shown(self.num_views, self.first_captions)]
        return {kind: self.stored.rows(kind) for kind in kinds if kind in self.stored.kinds}

    def refs(self, samples: SampleRows, rows: npt.NDArray[np.int64]) -> list[SampleRef]:
        """Return where samples are, by their rows among `samples`."""
        shards = samples.shard_of(rows).tolist()
        places = samples.column("places")[rows].tolist()
        parts = {shard: index_of(self.dataset).part(shard) for shard in set(shards)}
        return [SampleRef(parts[shard], place) for shard, place in zip(shards, places, strict=True)]

    def held_out_keys(self) -> pa.ChunkedArray:
        places = self.held_out.column("places")
        found = list[pa.Array]()
        for shard in np.flatnonzero(self.held_out.sizes).tolist():
            first, end = self.held_out.bounds(shard)
            keys = index_of(self.dataset).part(shard).keys
            found += keys.take(pa.array(places[first:end])).chunks
        return pa.chunked_array(found, pa.string())

    def num_extra_texts(self, batch_size: int) -> int:
        """Return how many further texts a step has, over all processes."""
        if self.extra_texts is None:
            return 0
        return batch_size if self.extra_texts.number is None else self.extra_texts.number


def kinds_shown(num_views: int, first_captions: bool) -> list[Kind]:
    """Return the kinds of rows that samples show beside those of whole images, where there are any."""
    further = [] if first_captions else [Kind.FURTHER]
    views = [Kind.VIEWS, Kind.VIEW_PARAMS] if num_views else []
    return [Kind.TEXTS, *further, *views]


def losses_of_captions(settings: DistillSettings) -> list[str]:
    """List the losses of the run that need the teacher's embeddings of captions."""
    return [loss.name for loss in settings.loss_entries() if not loss.one_tower]


def named_teachers(settings: DistillSettings) -> list[ModelName]:
    """Return the teachers as the user named them; none where the embeddings name them."""
    return [with_default_tag(parse_model(teacher)) for teacher in settings.teacher]


def find_embeddings(settings: DistillSettings, context: DistContext) -> tuple[Path, ...] | EmbedCost:
    """Find the teachers' embeddings, and make them where there are none; none when no loss needs them.

    Without ``--teacher`` it is the one whose embeddings the work directory holds.
    """
    if not settings.needs_teacher:
        return ()
    if settings.embeddings:
        return settings.embeddings
    if settings.online_teacher:
        return context.on_rank0(lambda: _find_of_online(settings))
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
        found = _ensure_embeddings(settings, teacher, context)
        if isinstance(found, EmbedCost):
            if teacher != teachers[-1]:
                reporting.note(f"That is the cost of {teacher} alone: the teachers after it are not estimated.")
            return found
        folders.append(found)
    return tuple(folders)


def _ensure_embeddings(settings: DistillSettings, teacher: str, context: DistContext) -> Path | EmbedCost:
    folder = choose_embeddings(settings.work, with_default_tag(parse_model(teacher)))
    exists = context.on_rank0(lambda: read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar) is not None)
    if not exists:
        with_views = f"run: {embed_with(parse_model(teacher), settings)} --views 4"
        validate_views(settings, folder, configured().get("views", 0), with_views)
        if not settings.dry_run:  # and before hours of embedding
            context.on_rank0(lambda: validate_board(settings.report_to, quiet=settings.quiet))
    # Existing embeddings of images only may suffice; new ones are of captions too.
    text = True if losses_of_captions(settings) or not exists else None
    return ensure_embeddings(settings, context, data=settings.data, model=teacher, text=text)


def _find_of_online(settings: DistillSettings) -> tuple[Path, ...]:
    """Find stored embeddings of an online teacher, where there are any.

    They name it, and tell the axes of the shared space and whether it is repaired.
    """
    work = WorkDirectory(settings.work)
    if not settings.teacher:
        return (work.find_embeddings(),) if work.has_embeddings() else ()
    [teacher] = named_teachers(settings)
    folder = choose_embeddings(settings.work, teacher)
    sidecar = read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar)
    is_its = sidecar is not None and find_mismatch(sidecar.model, teacher) is None
    return (folder,) if is_its else ()


def _choose_online(settings: DistillSettings, embeddings: Embeddings | None) -> ModelName:
    """Choose a teacher that runs alongside the student: the one named, else the embeddings', else the default one."""
    if settings.teacher:
        [name] = named_teachers(settings)
        return name
    if embeddings is None:
        return with_default_tag(parse_model(DEFAULT_MODEL))
    if embeddings.model is None:
        raise ClipcidError(f"{embeddings.folder} does not record which model made it.", "Name the --teacher.")
    return parse_model(embeddings.model.spec)


def find_inputs(settings: DistillSettings, folders: tuple[Path, ...], scratch: Path | None) -> Inputs:
    """Find, open and match the inputs, and report which were taken.

    Args:
        folders: The embeddings that `find_embeddings` found.
        scratch: Where a dry run keeps what a run keeps in the work directory.
    """
    work = WorkDirectory(settings.work)
    embeddings = None
    if folders:
        embeddings = open_stored(settings, folders, scratch or work.path)
    dataset = _open_data(settings, embeddings, scratch)
    usable = count_usable(dataset, settings.max_bad_fraction)
    keep_list = choose_keep_list(settings.keep_list, work, "samples", settings.max_bad_fraction)
    listed = None if keep_list is None else keep_list.path
    online = _choose_online(settings, embeddings) if settings.online_teacher else None
    if online is None and embeddings is not None:
        for member in embeddings.members:
            _validate_keys(member, dataset)
    clusters = find_clusters(settings, embeddings, online, listed)

    fingerprints = dataset.fingerprints() + ([] if listed is None else [record(listed)])
    sources = Sources(listed, embeddings, online is None, clusters)
    matched, counts = find_samples(settings, dataset, sources, fingerprints, scratch)
    if counts.bad_rows and sources.required:
        lacking = ", or missing from those of a teacher" if settings.num_teachers > 1 else ""
        reporting.warn(
            f"{counts.bad_rows:,} rows of the embeddings are zero or not finite{lacking}: their samples are left out."
        )
    if keep_list is not None:
        missing = usable.total - counts.listed
        keep_list.report(dataset.spec, usable.total, kept=counts.kept, missing=missing, key=_first_key(dataset))

    repair = pairing = None
    trust = 1.0
    if embeddings is not None:
        stored = embeddings
        embeddings, repair = repair_teacher(settings, stored)
        pairing = judge_pairing(stored, repair)
        trust = _choose_trust(settings, repair, pairing)
    num_views = 0
    first_captions = False
    extra_texts = None
    if online is not None:
        reporting.note(f"Teacher: {online.spec}, run alongside the student on the same views and captions.")
        if embeddings is not None:
            fingerprints += embeddings.fingerprints([Kind.TEXTS])
        elif settings.repair != "none":
            reporting.note("It is left as it is: a repair is fitted to stored embeddings, of which there are none.")
    elif embeddings is not None:
        num_views = _choose_views(settings, dataset, embeddings, counts)
        extra_texts = find_extra_texts(settings, embeddings, trust)
        varies = extra_texts is not None
        first_captions = _choose_captions(settings, embeddings, counts, varies)
        kinds = kinds_shown(num_views, first_captions) + ([Kind.VARIANTS] if varies else [])
        fingerprints += embeddings.fingerprints(kinds)
    chosen = None
    if clusters is not None:
        several_captions = counts.several_captions > 0 and not first_captions
        is_decided = not settings.dry_run or repair is not None or settings.repair == "none"
        chosen = use_clusters(settings, clusters, embeddings, counts, several_captions, is_decided)
        fingerprints += chosen.fingerprints()
    return Inputs(
        dataset=dataset,
        usable=usable,
        training=open_rows(matched, TRAINING),
        held_out=open_rows(matched, HELD_OUT),
        keep_list=keep_list,
        embeddings=embeddings,
        online=online,
        num_views=num_views,
        first_captions=first_captions,
        extra_texts=extra_texts,
        repair=repair,
        pairing=pairing,
        trust=trust,
        clusters=chosen,
        fingerprints=fingerprints,
    )


def _choose_trust(settings: DistillSettings, repair: RepairFigures | None, pairing: PairingFigures | None) -> float:
    """Return how far the losses follow the teacher, by its repair; say how well it knows the data.

    Where it is near chance, the default losses do not follow its features at all; those that were typed do.
    """
    trust = 1.0 if repair is None else repair.trust
    if pairing is None:
        return trust
    measured = describe_pairing(pairing)
    if settings.dry_run and repair is None and settings.repair != "none":
        measured += " (before a repair, on which a run decides)"
    if not pairing.near_chance:
        reporting.note(f"{measured}.")
        return trust
    taught = [loss.name for loss in settings.loss_entries(0.0) if loss.compares_features]
    typed = [f"{name}={weight:g}" for name, weight in settings.typed_losses.items() if name in taught]
    if settings.preset is not None:
        reporting.warn(
            f"{measured}: near chance, but followed, as --preset {settings.preset} says. Try --teacher none."
        )
        return trust
    if typed:
        reporting.warn(f"{measured}: near chance, but followed, as --loss {typed[0]} says. Try --teacher none.")
    else:
        reporting.warn(f"{measured}: near chance, so its features are not followed (no fd). Try --teacher none.")
    return 0.0


def _open_data(settings: DistillSettings, embeddings: Embeddings | None, scratch: Path | None) -> Dataset:
    work = WorkDirectory(settings.work)
    if settings.data is not None:
        dataset = open_named(settings, settings.data, work.indexes)
    else:
        described = recorded_data(work.find_embeddings() if embeddings is None else embeddings.folder)
        dataset = open_described(described, work.indexes, **settings.trust)
        reporting.note(f"Data: {dataset.spec}, from which the embeddings were made.")
    if scratch is not None and dataset.index is None:
        dataset = dataclasses.replace(dataset, index_folder=scratch / "index")
    dataset = index_alone(dataset, settings.workers)  # `embed` has mostly done it before
    note_captions(dataset)
    return cache_shards(dataset, settings.cache_size)


def open_stored(settings: DistillSettings, folders: tuple[Path, ...], work: Path | None) -> Embeddings:
    """Open the teachers' embeddings, check that they made them, and look for the captions that the losses need."""
    embeddings = open_teachers(settings, folders, work)
    if settings.needs_teacher and settings.teacher:
        for member, teacher in zip(embeddings.members, named_teachers(settings), strict=True):
            _validate_made_by(teacher, member, settings)
    if "siglip-kd" in settings.losses():
        models = [member.model for member in embeddings.members if member.has_texts]
        has_bias = [model is not None and model.logit_bias is not None for model in models]
        if any(has_bias) and not all(has_bias):
            reporting.note("siglip-kd takes the softmax of the teachers: not all of them have a logit bias.")
    folder = embeddings.folder
    if embeddings.has_texts or settings.online_teacher:
        return embeddings
    needing = losses_of_captions(settings)
    if needing:
        raise ClipcidError(
            f"{folder} holds embeddings of images only, and captions are needed by: {', '.join(needing)}.",
            "Use losses that need one tower only: "
            + ", ".join(name for name, entry in LOSSES.items() if entry.one_tower)
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


def _validate_keys(embeddings: Embeddings, dataset: Dataset) -> None:
    """Refuse embeddings whose keys or captions are of another form than the data's."""
    if embeddings.sidecar is None:
        return
    made = embeddings.sidecar.made
    keys = made.keys
    if embeddings.has_texts and made.caption_key != dataset.caption_keys:
        wanted = " ".join(f"--caption-key {key}" for key in made.caption_key)
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} were made with {wanted or 'no --caption-key'}, the data is read with "
            f"{' '.join(dataset.caption_keys) or 'none'}: captions differ.",
            f"Give {wanted}." if wanted else "Omit --caption-key.",
        )
    if embeddings.has_texts and made.caption_lines != dataset.caption_lines:
        flag = "--caption-lines" if made.caption_lines else "--no-caption-lines"
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} were made with {flag}, the data is read without it: captions differ.",
            f"Add {flag}.",
        )
    if keys != dataset.keys:
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} were made with --keys {keys}, the data is read with --keys "
            f"{dataset.keys}: they cannot be joined.",
            f"Add --keys {keys}.",
        )


def _first_key(dataset: Dataset) -> str:
    index = index_of(dataset)
    return str(index.part(int(np.flatnonzero(index.sizes)[0])).keys[0])


def _choose_views(settings: DistillSettings, dataset: Dataset, embeddings: Embeddings, counts: MatchCounts) -> int:
    """Return how many stored views of each image are shown; refuse embeddings that lack many of the samples."""
    if counts.without_embedding > settings.max_bad_fraction * counts.candidates:
        number, member = max(zip(embeddings.lacking, embeddings.members, strict=True), key=lambda pair: pair[0])
        at_fault = member if 2 * number >= counts.without_embedding else embeddings
        told = f"{counts.without_embedding:,} of {counts.candidates:,} samples have no embedding in {at_fault.folder}."
        advice = ""
        if counts.without_embedding == counts.candidates:
            told += f" {compare_keys(_first_key(dataset), at_fault)}"
            advice = advise_keys(at_fault)
        again = f"Give the data that was embedded, or embed this data. {at_fault.embed_again()}"
        raise ClipcidError(told, advice + again)
    views = embeddings.num_each(Kind.VIEWS) if settings.shows_views else 0
    validate_views(
        settings, embeddings.folder, views, f"embed some. {embeddings.embed_again(views=4, view_kind='mix')}"
    )
    if views:
        reporting.note(
            f"Views: {views} of each image are stored and replayed; --crop-scale, --color-jitter and --gray-probability "
            "have no effect (--views none draws new views)."
        )
    return views


def _choose_captions(settings: DistillSettings, embeddings: Embeddings, counts: MatchCounts, varies: bool) -> bool:
    """Tell whether samples may only show their first caption; refuse other captions than were embedded or varied."""
    has_several = counts.several_captions > 0 and embeddings.has_texts
    shows_all = has_several and Kind.FURTHER in embeddings.kinds
    if counts.changed is not None and (shows_all or varies):
        key, now, embedded = counts.changed
        raise ClipcidError(
            f"Sample {key!r} has {now} captions, but {embedded} were embedded in {embeddings.folder}: the data has changed.",
            embeddings.embed_again(),
        )
    if shows_all:
        reporting.note(f"Captions: {counts.captions:,} of {counts.selected:,} samples, one drawn in each epoch.")
    elif has_several:
        reporting.note("Captions: only the first of each sample is embedded, so only the first is shown.")
    return embeddings.has_texts and not shows_all


def validate_views(settings: DistillSettings, folder: Path, views: int, with_views: str) -> None:
    """Refuse embeddings without views where these were asked for by name; `with_views` says how to make some."""
    if settings.views == "stored" and not views:
        raise ClipcidError(f"--views stored, but {folder} holds no views.", f"Omit --views stored, or {with_views}")
