"""Whom a student learns from: nobody, stored rows that come with each batch, or a model that runs alongside the student.

What a teacher is, and how far it is followed, is chosen on the first process (`choose_teacher`); each process then loads it
(`Teacher.loaded`) and asks it for its rows of every batch (`Teacher.rows`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from torch import Tensor

from clipcid_cli.algorithms.losses.registry import LOSSES, PRESETS, TEACHER_SCALE, LossEntry, Weight
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.records import Pairing, Repair
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.models.renderer import Processor
from clipcid_cli.steps import reporting
from clipcid_cli.steps.distill.samples import MatchCounts
from clipcid_cli.steps.distill.stored import validate_matches, validate_views
from clipcid_cli.steps.distill.training_batch import TrainingBatch
from clipcid_cli.steps.pairing import MAX_SCALE, judge_pairing, teacher_scale
from clipcid_cli.steps.repair import describe_repair, repair_teacher
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import VIEW_KINDS

if TYPE_CHECKING:
    from clipcid_cli.steps.distill.extra_texts import ExtraTexts

# Views of another tool, or of a kind that `embed` no longer draws, may have any crop and colours.
_ANY = Augmentation(crop_scale=0.08, color_jitter=1.0, gray_probability=1.0)


class TeacherRows(NamedTuple):
    """A teacher's rows of a process's part of a batch, in its own space, [b, D]."""

    image: Tensor
    text: Tensor | None  # None where it has none of captions
    extra_text: Tensor | None = None  # of further texts, [e, D]


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How well a teacher pairs images with captions; None where nothing was judged."""

    repair: Repair | None = None  # of its image rows
    pairing: Pairing | None = None
    is_decided: bool = True  # whether it is known if it is repaired; a dry run may leave it to the run

    def recorded(self) -> dict[str, Any]:
        """Return what a run's result says of it."""
        repair = self.repair if self.repair is not None and self.repair.repaired else None
        figures = {"repair": repair, "pairing": self.pairing}
        return {name: msgspec.to_builtins(value) for name, value in figures.items() if value is not None}

    def listed(self, settings: DistillSettings) -> list[tuple[str, str]]:
        """Return what a report says of it."""
        listed = []
        if self.repair is not None:
            listed.append(("repair", describe_repair(self.repair)))
        if self.pairing is not None:
            verdict = f": near chance; try {name_no_teacher(settings)}" if self.pairing.near_chance else ""
            listed.append(("pairing", f"{self.pairing.describe()}{verdict}."))
        return listed


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher; this one is nobody, of whom nothing is stored."""

    embeddings: Embeddings | None = None  # repaired where that is better
    judgement: Judgement = dataclasses.field(default_factory=Judgement)
    num_views: int = 0  # stored views of each image that are replayed, 0 for none
    first_captions: bool = False  # whether a sample may only show its first caption, the only one that is embedded
    extra_texts: ExtraTexts | None = None
    online: ModelName | None = None  # the model that runs alongside the student; None where none does

    @property
    def model_name(self) -> str | None:
        """Its name for people; None where there is no teacher, or nothing records which it is."""
        return None

    @property
    def width(self) -> int | None:
        """Dimensions of its features; None where there is no teacher."""
        return None

    @property
    def scale(self) -> float | None:
        """Its logit scale, exp(logit_scale)."""
        return None

    @property
    def bias(self) -> float | None:
        """Its logit bias; None where it was trained with a softmax."""
        return None

    @property
    def processor(self) -> Processor | None:
        """How it takes images and captions itself; None where its rows of them are stored."""
        return None

    def loaded(self, settings: DistillSettings, context: DistContext) -> Teacher:
        """Load what runs on this process's device; call it on every process."""
        return self

    def announce(self, losses: Collection[LossEntry]) -> None:
        """Say how it is used in training with such losses."""

    def rows(self, batch: TrainingBatch) -> TeacherRows | None:
        """Return its rows of what a process's part of a batch shows; None where there is no teacher."""
        return None

    def rows_shown(self) -> dict[Kind, Rows]:
        """Map the stored rows of what samples show, for workers."""
        return {}

    def augmentation(self, chosen: Augmentation) -> Augmentation:
        """Return the smallest crops and strongest colours of what is shown: chosen ones, unless views are stored."""
        return chosen

    def num_extra_texts(self, batch_size: int) -> int:
        """Return how many further texts a step has, over all processes."""
        if self.extra_texts is None:
            return 0
        return batch_size if self.extra_texts.number is None else self.extra_texts.number

    def fingerprints(self) -> list[FileRecord]:
        """Describe the files that a run reads of it."""
        return []

    def describe_weights(self) -> list[FileRecord]:
        """Describe a loaded model as inputs of the run."""
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTeacher(Teacher):
    """A teacher that has embedded all that is shown."""

    embeddings: Embeddings

    @property
    def model_name(self) -> str | None:
        return self.embeddings.model_name

    @property
    def width(self) -> int:
        return self.embeddings.width

    @property
    def scale(self) -> float:
        return teacher_scale(self.embeddings)

    @property
    def bias(self) -> float | None:
        return None if self.embeddings.model is None else self.embeddings.model.logit_bias

    def announce(self, losses: Collection[LossEntry]) -> None:
        """Say where the logit scale is not the teacher's own."""
        is_recorded = self.embeddings.model is not None and self.embeddings.model.logit_scale is not None
        if not is_recorded and any(TEACHER_SCALE in loss.reads for loss in losses):
            reporting.note(f"The embeddings do not record the teacher's logit scale; using {MAX_SCALE:g}.")

    def rows(self, batch: TrainingBatch) -> TeacherRows:
        """Take the rows that workers have read."""
        assert batch.teacher_image_bD is not None, "workers read the stored rows"
        return TeacherRows(batch.teacher_image_bD, batch.teacher_text_bD, batch.teacher_extra_eD)

    def rows_shown(self) -> dict[Kind, Rows]:
        kinds = [Kind.IMAGES, *_kinds_shown(self.num_views, self.first_captions)]
        return {kind: self.embeddings.rows(kind) for kind in kinds if kind in self.embeddings.kinds}

    def augmentation(self, chosen: Augmentation) -> Augmentation:
        if not self.num_views:
            return chosen
        sidecar = self.embeddings.sidecar
        if sidecar is None or not set(sidecar.made.view_kind) <= set(VIEW_KINDS):
            return _ANY
        return Augmentation(sidecar.made.crop_scale, sidecar.made.color_jitter, sidecar.made.gray_probability)

    def fingerprints(self) -> list[FileRecord]:
        kinds = _kinds_shown(self.num_views, self.first_captions)
        if self.extra_texts is not None:
            kinds.append(Kind.VARIANTS)
        return self.embeddings.fingerprints(kinds)


def judge_teacher(settings: DistillSettings, embeddings: Embeddings) -> tuple[Embeddings, Judgement]:
    """Repair the teacher of stored rows where that is better, and measure how well it then pairs them."""
    repaired, repair = repair_teacher(settings, embeddings)
    pairing = repair.pairing if repair is not None and repair.repaired else judge_pairing(embeddings)
    is_decided = not settings.dry_run or repair is not None or settings.repair == "none"
    return repaired, Judgement(repair, pairing, is_decided)


def choose_losses(settings: DistillSettings, judgement: Judgement) -> dict[LossEntry, Weight]:
    """Return the run's losses, other ones where the teacher is near chance; say how well it knows the data.

    It is where `Pairing.near_chance` is true: `summarise_ranks` decides.
    """
    pairing = judgement.pairing
    if pairing is None:
        return settings.losses
    measured = pairing.describe()
    if not judgement.is_decided:
        measured += " (before a repair, on which a run decides)"
    if not pairing.near_chance:
        reporting.note(f"{measured}.")
        return settings.losses
    losses = settings.losses_near_chance
    reporting.warn(
        f"{measured}: near chance, {_describe_following(settings, losses)}. Try {name_no_teacher(settings)}."
    )
    return losses


def _describe_following(settings: DistillSettings, losses: dict[LossEntry, Weight]) -> str:
    """Say which flag has the features of a teacher near chance followed, else which losses the run has instead."""
    followed = {loss.name: weight for loss, weight in losses.items() if loss.compares_features}
    for name, weight in followed.items():
        if name in settings.typed_losses:
            return f"but followed, as --loss {name}={weight.value:g} says"
    if settings.preset is not None and followed:
        return f"but followed, as --preset {settings.preset} says"
    if settings.preset is not None:
        return f"and no loss follows its features (--preset {settings.preset} stays)"
    return f"so its features are not followed: the losses are {' and '.join(loss.name for loss in losses)}"


def choose_teacher(
    settings: DistillSettings,
    losses: Collection[LossEntry],
    embeddings: Embeddings | None,
    judgement: Judgement,
    online: ModelName | None,
    dataset: Dataset,
    counts: MatchCounts,
) -> Teacher:
    """Decide what the teacher gives, on the first process, and say so.

    Args:
        losses: Of the run.
        embeddings: Stored embeddings of the teacher, where there are any: repaired where that is better.
        judgement: Of the teacher, by its stored embeddings.
        online: A teacher that runs alongside the student.
        counts: How the data was matched with the embeddings.
    """
    if online is not None:
        reporting.note(f"Teacher: {online.spec}, run alongside the student on the same views and captions.")
        if embeddings is None and settings.repair != "none":
            reporting.note("It is left as it is: a repair is fitted to stored embeddings, of which there are none.")
        from clipcid_cli.steps.distill.online_teacher import OnlineTeacher

        return OnlineTeacher(embeddings, judgement, online=online)
    if embeddings is None:
        return Teacher()
    validate_matches(settings, dataset, embeddings, counts)
    num_views = _choose_views(settings, embeddings)
    extra_texts: ExtraTexts | None = None
    if settings.extra_texts or Kind.VARIANTS in embeddings.kinds:
        from clipcid_cli.steps.distill.extra_texts import find_extra_texts

        extra_texts = find_extra_texts(settings, losses, embeddings)
    first_captions = embeddings.has_texts
    if settings.student_caption_key:
        keys = " or ".join(settings.student_caption_key)
        taught = ", by the teacher's rows of its own" if embeddings.has_texts else ""
        reporting.note(f"The student reads captions {keys}, the first of each sample{taught}.")
    elif settings.shows_captions:
        first_captions = _choose_captions(embeddings, counts, varies=extra_texts is not None)
    return StoredTeacher(
        embeddings=embeddings,
        judgement=judgement,
        num_views=num_views,
        first_captions=first_captions,
        extra_texts=extra_texts,
    )


def name_no_teacher(settings: DistillSettings) -> str:
    """Return the flag to train without a teacher, and the given ones that it does not go with."""
    of_teacher = {
        "--text-tower teacher": settings.keeps_text_tower,
        "--online-teacher": settings.online_teacher,
        "--views stored": settings.views == "stored",
        f"--extra-texts {settings.extra_texts}": bool(settings.extra_texts),
        "--student-caption-key": bool(settings.student_caption_key),
    }
    needing = [flag for flag, is_given in of_teacher.items() if is_given]
    if settings.preset is not None and any(LOSSES[name].needs_teacher for name in PRESETS[settings.preset]):
        needing.append(f"--preset {settings.preset}")
    for name, weight in settings.typed_losses.items():
        if weight and name in LOSSES and LOSSES[name].needs_teacher:
            needing.append(f"--loss {name}={weight:g}")
    return "--teacher none" + (f" without {' and '.join(needing)}" if needing else "")


def _choose_views(settings: DistillSettings, embeddings: Embeddings) -> int:
    """Return how many stored views of each image are shown, and say so."""
    views = embeddings.num_each(Kind.VIEWS) if settings.shows_views else 0
    with_views = f"embed some. {embeddings.embed_again(views=4, view_kind='mix')}"
    validate_views(settings, embeddings.folder, views, with_views)
    if views:
        reporting.note(
            f"Views: {views} of each image are stored and replayed; --crop-scale, --color-jitter and --gray-probability "
            "have no effect (--views none draws new views)."
        )
    return views


def _choose_captions(embeddings: Embeddings, counts: MatchCounts, *, varies: bool) -> bool:
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


def _kinds_shown(num_views: int, first_captions: bool) -> list[Kind]:
    """Return the kinds of rows that samples show beside those of whole images, where there are any."""
    further = [] if first_captions else [Kind.FURTHER]
    views = [Kind.VIEWS, Kind.VIEW_PARAMS] if num_views else []
    return [Kind.TEXTS, *further, *views]
