"""What a teacher provides on disk: its embeddings, checked against teacher and data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clipcid_cli.algorithms.losses.registry import LOSSES, served_by_one_tower
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.command import data_command
from clipcid_cli.formats.embeddings.folder import Embeddings, open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.results.clusters import CENTROIDS, TABLE, Clusters
from clipcid_cli.formats.results.matched_samples import SampleRows
from clipcid_cli.formats.sidecar import EmbedSidecar, read_sidecar, sidecar_path
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.names import ModelName, parse_model, read_width, with_default_tag
from clipcid_cli.runtime.text_variants import TextVariants
from clipcid_cli.steps.distill.augmented.captions import find_text_variants, has_all_captions
from clipcid_cli.steps.distill.augmented.extra_texts import ExtraTexts, find_extra_texts
from clipcid_cli.steps.distill.augmented.requested import require_requested
from clipcid_cli.steps.distill.augmented.views import StoredViews
from clipcid_cli.steps.distill.samples import MatchCounts
from clipcid_cli.steps.embed.ensure import ensure_embeddings
from clipcid_cli.steps.embed.views import Views
from clipcid_cli.steps.model_identity import embed_with, find_mismatch
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL


@dataclasses.dataclass(frozen=True)
class TeacherInputs:
    """What the teacher provides.

    Attributes:
        embeddings: Its stored embeddings; None for an online teacher without any.
        samples: The samples to train on, with their rows of embeddings and clusters.
        clusters: Clusters; None where no loss needs them.
        num_views: Stored views of each image that are replayed, 0 for none.
        text_variants: The embedded variants of captions that are shown; None for none.
        extra_texts: Further texts for the text tower; None without any.
        all_captions: Whether every caption of a sample is embedded, so that any may be shown.
        online: The teacher that runs alongside the student; None where stored embeddings teach.
        text_clusters: Whether clusters teach the text tower as well.
    """

    embeddings: Embeddings | None
    samples: SampleRows
    clusters: Clusters | None = None
    num_views: int = 0
    text_variants: TextVariants | None = None
    extra_texts: ExtraTexts | None = None
    all_captions: bool = False
    online: ModelName | None = None
    text_clusters: bool = False

    @property
    def first_captions(self) -> bool:
        """Whether a sample may only show its first caption, the only one that is embedded."""
        return (
            self.embeddings is not None and self.embeddings.has_texts and self.online is None and not self.all_captions
        )

    def stored_views(self, seed: int) -> StoredViews | None:
        """Return the stored views for training; None where none are replayed."""
        if self.embeddings is None or not self.num_views:
            return None
        return StoredViews(
            self.embeddings.rows(Kind.VIEW_PARAMS), self.num_views, self.samples.column("embeddings"), seed
        )

    def augmentation(self, chosen: Augmentation) -> Augmentation:
        """Return how images are augmented: as the strongest of the stored views were, else as chosen."""
        if self.embeddings is None or not self.num_views:
            return chosen
        if self.embeddings.sidecar is None:  # another tool's views may have any crop and colours
            return Augmentation(crop_scale=0.08, color_jitter=1.0, gray_probability=1.0)
        made = self.embeddings.sidecar.made
        drawn = Augmentation(made.crop_scale, made.color_jitter, made.gray_probability)
        return Views(self.num_views, made.view_kind, drawn, made.seed).strongest

    def fingerprints(self) -> list[FileRecord]:
        """Describe the files a run reads, for its sidecar."""
        found: list[FileRecord] = []
        if self.embeddings is not None:
            # The rows themselves, not their sidecar: the same rows embedded again at another speed are the same input.
            shown = [Kind.TEXTS] + [Kind.FURTHER] * self.all_captions
            shown += [Kind.VIEWS, Kind.VIEW_PARAMS] * (self.num_views > 0)
            shown += [Kind.VARIANTS] * (self.text_variants is not None)
            found += self.embeddings.fingerprints(shown)
        if self.extra_texts is not None and self.extra_texts.texts is not None:
            found += self.extra_texts.texts.fingerprints()
        if self.clusters is not None:
            found += [record(self.clusters.folder / name) for name in (TABLE, CENTROIDS)]
        return found


def needs_teacher_texts(settings: DistillSettings) -> bool:
    """Tell whether any loss of the run needs the teacher's embeddings of captions."""
    return not all(served_by_one_tower(settings.losses()).values())


def find_embeddings(settings: DistillSettings, machine: Machine, reporter: Reporter) -> Path | None:
    """Find the teacher's embeddings, and make them where there are none; None when no loss needs them.

    Without ``--teacher`` it is the one whose embeddings the work directory holds.
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
            if settings.data is None or WorkDirectory(settings.work).has_embeddings():
                raise
        teacher = DEFAULT_MODEL
        reporter.note(f"Teacher: {teacher}, the default.")
    # Existing embeddings of images only may suffice; new ones are of captions too.
    folder = WorkDirectory(settings.work).embeddings(with_default_tag(parse_model(teacher)).slug)
    exists = machine.on_main(lambda: read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar) is not None)
    if not exists:
        require_requested(settings, folder, None, model=teacher)
    text = True if needs_teacher_texts(settings) or not exists else None
    return ensure_embeddings(settings, machine, reporter, data=settings.data, model=teacher, text=text)


def _find_for_axes(settings: DistillSettings) -> Path | None:
    """Find stored embeddings of an online teacher: they name it, and have the axes of the shared space; None for none."""
    work, teacher = WorkDirectory(settings.work), named_teacher(settings)
    if teacher is not None:
        folder = work.embeddings(teacher.slug)
        sidecar = read_sidecar(sidecar_path(folder, "embed"), EmbedSidecar)
        is_its = sidecar is not None and find_mismatch(sidecar.model, teacher) is None
        return folder if is_its and settings.teacher_space != "project" else None
    return work.find_embeddings() if work.has_embeddings() else None


def open_teacher(
    settings: DistillSettings, folder: Path, teacher: ModelName | None, cache: Path | None, reporter: Reporter
) -> Embeddings:
    """Open the teacher's embeddings and check that the teacher made them.

    Args:
        teacher: The teacher, where it was named or runs online.
        cache: Table in which the fingerprints of the files are remembered.
    """
    embeddings = open_embeddings(folder, settings.keys, settings.npz_array, cache)
    reporter.note(f"Embeddings: {folder}, {embeddings.num_rows:,} rows of width {embeddings.width}.")
    if teacher is not None:
        _check_teacher(settings, teacher, embeddings)
    if not embeddings.has_texts and not settings.online_teacher:
        needing = [name for name, served in served_by_one_tower(settings.losses()).items() if not served]
        if needing:
            raise ClipcidError(
                f"{folder} holds embeddings of images only, and captions are needed by: {', '.join(needing)}.",
                "Use losses that need one tower only: "
                + ", ".join(name for name, served in served_by_one_tower(LOSSES).items() if served)
                + "\nOr embed the captions too: "
                + data_command(folder, embeddings.sidecar, settings.data, **settings.data_flags, text=True),
            )
        reporter.note("They are of images only: losses use the teacher's image tower alone.")
    return embeddings


def named_teacher(settings: DistillSettings) -> ModelName | None:
    """Return the teacher as the user named it; None where the embeddings name it."""
    return None if settings.teacher is None else with_default_tag(parse_model(settings.teacher))


def _check_teacher(settings: DistillSettings, name: ModelName, embeddings: Embeddings) -> None:
    """Refuse embeddings of another model than the teacher's; of those of other tools only the width can be checked."""
    if embeddings.sidecar is None:
        width = read_width(name)
        if width is not None and width != embeddings.width:
            raise ClipcidError(
                f"The embeddings in {embeddings.folder} have width {embeddings.width}; those of the teacher {name.spec} "
                f"have {width}.",
                f"Name the model that made them with --teacher, or run: {embed_with(name, settings)}",
            )
        return
    model = embeddings.sidecar.model
    difference = find_mismatch(model, name)
    if difference is not None:
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} are of {model.spec}, {difference.what} {difference.recorded}; the "
            f"teacher is {name.spec}, {difference.what} {difference.named}.",
            f"Omit --embeddings, or run: {embed_with(name, settings, embeddings.sidecar.data)}",
        )


def check_keys(embeddings: Embeddings, dataset: Dataset) -> None:
    """Refuse embeddings whose keys are of another form than the data's."""
    keys = None if embeddings.sidecar is None else embeddings.sidecar.made.keys
    if keys is not None and keys != dataset.keys:
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} were made with --keys {keys}, the data is read with --keys "
            f"{dataset.keys}: they cannot be joined.",
            f"Add --keys {keys}.",
        )


def use_stored(
    settings: DistillSettings, embeddings: Embeddings, samples: SampleRows, counts: MatchCounts, reporter: Reporter
) -> TeacherInputs:
    """Let stored embeddings teach.

    Args:
        samples: The samples to train on.
        counts: What matching them with the embeddings found.
    """
    if counts.without_embedding > settings.max_bad_fraction * counts.candidates:
        raise ClipcidError(
            f"{counts.without_embedding:,} of {counts.candidates:,} samples have no embedding in {embeddings.folder}.",
            "Give the data that was embedded, or run: "
            + data_command(embeddings.folder, embeddings.sidecar, settings.data, **settings.data_flags),
        )
    views = embeddings.num_each(Kind.VIEWS) if settings.shows_views else 0
    variants = embeddings.num_each(Kind.VARIANTS) if embeddings.has_texts else 0
    require_requested(settings, embeddings.folder, embeddings.sidecar, views=views, variants=variants)
    if views:
        reporter.note(
            f"Views: {views} of each image are stored and replayed; --crop-scale, --color-jitter and --gray-probability "
            "have no effect (--views none draws views anew)."
        )
    all_captions = has_all_captions(settings, embeddings, counts, reporter)
    text_variants = find_text_variants(settings, embeddings, counts, reporter)
    extra = find_extra_texts(settings, embeddings, samples, text_variants, reporter)
    if not settings.variant_share and (extra is None or extra.variants is None):
        text_variants = None
    return TeacherInputs(embeddings, samples, None, views, text_variants, extra, all_captions)
