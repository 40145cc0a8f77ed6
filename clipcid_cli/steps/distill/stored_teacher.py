"""The teacher of a run: its stored embeddings, checked against teacher and data, and what of them is shown; or its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.command import data_command, texts_command
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.formats.embeddings.text_folder import EmbeddedTexts, TextLines, open_texts
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.sidecar import EmbedSidecar
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.models.augment import Augmentation
from clipcid_cli.runtime.models.names import ModelName, parse_model, read_width, with_default_tag
from clipcid_cli.runtime.text_variants import RULES, TextVariants
from clipcid_cli.steps.distill.samples import MatchCounts
from clipcid_cli.steps.embed.encoder import Views
from clipcid_cli.steps.given_embeddings import open_given
from clipcid_cli.steps.models import embed_with, validate_teacher
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.embed import DEFAULT_MODEL

# Another tool's views may have any crop and colours.
_ANY = Augmentation(crop_scale=0.08, color_jitter=1.0, gray_probability=1.0)


class ExtraText(NamedTuple):
    """A further text, as it is sent to a worker: its row among those embedded, and the sample of which it is a variant."""

    row: int
    sample: SampleRef | None = None


@dataclasses.dataclass(frozen=True)
class ExtraTexts:
    """Further texts for the text tower alone: lines of `embed --texts`, or variants of captions.

    Attributes:
        rows: The teacher's embeddings of all there are.
        number: Texts a step, over all processes; None for as many as the batch has samples.
        fingerprints: Of the files of the lines.
    """

    rows: Rows
    lines: TextLines | None
    variants: TextVariants | None
    number: int | None
    fingerprints: list[FileRecord]

    def read(self, text: ExtraText) -> str:
        """Return the words of a text."""
        if self.lines is not None:
            return self.lines[text.row]
        assert self.variants is not None
        assert text.sample is not None
        sample = text.sample.read()
        return self.variants(sample.captions, sample.key, text.row % self.variants.number)


@dataclasses.dataclass(frozen=True)
class StoredTeacher:
    """A teacher whose stored embeddings teach.

    Attributes:
        num_views: Stored views of each image that are replayed, 0 for none.
        all_captions: Whether every caption of a sample is embedded, so that any may be shown.
    """

    embeddings: Embeddings
    num_views: int
    all_captions: bool
    extra_texts: ExtraTexts | None

    @property
    def first_captions(self) -> bool:
        """Whether a sample may only show its first caption, the only one that is embedded."""
        return self.embeddings.has_texts and not self.all_captions

    def augmentation(self, chosen: Augmentation) -> Augmentation:
        """Return how images are augmented: as the strongest of the stored views were, else as chosen."""
        if not self.num_views:
            return chosen
        if self.embeddings.sidecar is None:
            return _ANY
        made = self.embeddings.sidecar.made
        drawn = Augmentation(made.crop_scale, made.color_jitter, made.gray_probability)
        return Views(self.num_views, made.view_kind, drawn, made.seed).strongest

    def rows(self) -> dict[Kind, Rows]:
        """Map the rows of all that is shown."""
        found = [kind for kind in self._kinds if kind in self.embeddings.kinds]
        return {kind: self.embeddings.rows(kind) for kind in (Kind.IMAGES, *found)}

    def fingerprints(self) -> list[FileRecord]:
        """Describe the files a run reads, for its sidecar."""
        # The rows themselves, not their sidecar: the same rows embedded again at another speed are the same input.
        read = self.embeddings.fingerprints(self._kinds)
        return read if self.extra_texts is None else read + self.extra_texts.fingerprints

    @property
    def _kinds(self) -> list[Kind]:
        """The kinds of rows that are shown, beside those of whole images; of captions only where there are any."""
        views = [Kind.VIEWS, Kind.VIEW_PARAMS] if self.num_views else []
        further = [Kind.FURTHER] if self.all_captions else []
        variants = [] if self.extra_texts is None or self.extra_texts.variants is None else [Kind.VARIANTS]
        return [Kind.TEXTS, *further, *views, *variants]


@dataclasses.dataclass(frozen=True)
class OnlineTeacher:
    """A teacher that runs alongside the student.

    Attributes:
        embeddings: Its stored ones, in which the axes of the shared space are found; None where there are none.
    """

    first_captions: ClassVar[bool] = False  # it reads whatever caption the student is shown

    name: ModelName
    embeddings: Embeddings | None

    def fingerprints(self) -> list[FileRecord]:
        """Describe the files a run reads, for its sidecar."""
        return [] if self.embeddings is None else self.embeddings.fingerprints([Kind.TEXTS])


def losses_of_captions(settings: DistillSettings) -> list[str]:
    """List the losses of the run that need the teacher's embeddings of captions."""
    return [name for name in settings.losses() if not LOSSES[name].one_tower]


def named_teacher(settings: DistillSettings) -> ModelName | None:
    """Return the teacher as the user named it; None where the embeddings name it."""
    return None if settings.teacher is None else with_default_tag(parse_model(settings.teacher))


def choose_online(settings: DistillSettings, embeddings: Embeddings | None) -> OnlineTeacher:
    """Choose a teacher that runs alongside the student: the one named, else the embeddings', else the default one."""
    name = named_teacher(settings)
    if name is None and embeddings is not None:
        if embeddings.model is None:
            raise ClipcidError(f"{embeddings.folder} does not record which model made it.", "Name the --teacher.")
        name = parse_model(embeddings.model.spec)
    return OnlineTeacher(name or with_default_tag(parse_model(DEFAULT_MODEL)), embeddings)


def open_stored(settings: DistillSettings, folder: Path, cache: Path | None, reporter: Reporter) -> Embeddings:
    """Open the teacher's embeddings and check that the teacher made them, and for the captions that the losses need."""
    embeddings = open_given(settings, folder, cache, reporter)
    reporter.note(f"Embeddings: {folder}, {embeddings.num_rows:,} rows of width {embeddings.width}.")
    teacher = named_teacher(settings) if settings.needs_teacher else None
    if teacher is not None and embeddings.sidecar is not None:
        fix = f"Omit --embeddings, or run: {embed_with(teacher, settings, embeddings.sidecar.data)}"
        validate_teacher(f"embeddings in {folder}", embeddings.sidecar.model, teacher, fix)
    elif teacher is not None and (width := read_width(teacher)) not in (None, embeddings.width):
        raise ClipcidError(
            f"The embeddings in {folder} have width {embeddings.width}; those of the teacher {teacher.spec} have {width}.",
            f"Name the model that made them with --teacher, or run: {embed_with(teacher, settings)}",
        )
    if embeddings.has_texts or settings.online_teacher:
        return embeddings
    needing = losses_of_captions(settings)
    if needing:
        raise ClipcidError(
            f"{folder} holds embeddings of images only, and captions are needed by: {', '.join(needing)}.",
            "Use losses that need one tower only: "
            + ", ".join(name for name, entry in LOSSES.items() if entry.one_tower)
            + f"\nOr embed the captions too: {_embed_again(settings, embeddings, text=True)}",
        )
    reporter.note("They are of images only: losses use the teacher's image tower alone.")
    return embeddings


def _embed_again(settings: DistillSettings, embeddings: Embeddings, **more: Any) -> str:
    """Return the command that makes embeddings as they are, or with more beside them."""
    return data_command(embeddings.folder, embeddings.sidecar, settings.data, **settings.data_flags, **more)


def validate_keys(embeddings: Embeddings, dataset: Dataset) -> None:
    """Refuse embeddings whose keys or captions are of another form than the data's."""
    if embeddings.sidecar is None:
        return
    made = embeddings.sidecar.made
    keys = made.keys
    if made.caption_lines != dataset.caption_lines:
        flag = "--caption-lines" if made.caption_lines else "--no-caption-lines"
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} were made with {flag}, the data is not read so: captions differ.",
            f"Add {flag}.",
        )
    if keys != dataset.keys:
        raise ClipcidError(
            f"The embeddings in {embeddings.folder} were made with --keys {keys}, the data is read with --keys "
            f"{dataset.keys}: they cannot be joined.",
            f"Add --keys {keys}.",
        )


def use_stored(
    settings: DistillSettings, embeddings: Embeddings, counts: MatchCounts, reporter: Reporter
) -> StoredTeacher:
    """Let stored embeddings teach: all that they hold of the data, unless the settings say otherwise."""
    again = _embed_again(settings, embeddings)
    if counts.without_embedding > settings.max_bad_fraction * counts.candidates:
        raise ClipcidError(
            f"{counts.without_embedding:,} of {counts.candidates:,} samples have no embedding in {embeddings.folder}.",
            f"Give the data that was embedded, or run: {again}",
        )
    views = embeddings.num_each(Kind.VIEWS) if settings.shows_views else 0
    validate_views(settings, embeddings.folder, embeddings.sidecar, views)
    if views:
        reporter.note(
            f"Views: {views} of each image are stored and replayed; --crop-scale, --color-jitter and --gray-probability "
            "have no effect (--views none draws views anew)."
        )
    has_several = counts.several_captions > 0 and embeddings.has_texts
    all_captions = has_several and Kind.FURTHER in embeddings.kinds
    if all_captions:
        reporter.note(f"Captions: {counts.captions:,} of {counts.selected:,} samples, one drawn in each epoch.")
    elif has_several:
        reporter.note("Captions: only the first of each sample is embedded, so only the first is shown.")
    extra = _find_extra_texts(settings, embeddings, reporter)
    varies = extra is not None and extra.variants is not None
    if counts.changed is not None and (all_captions or varies):
        key, now, embedded = counts.changed
        raise ClipcidError(
            f"Sample {key!r} has {now} captions, but {embedded} were embedded in {embeddings.folder}: the data has changed.",
            f"Run: {again}",
        )
    return StoredTeacher(embeddings, views, all_captions, extra)


def _known_variants(settings: DistillSettings, embeddings: Embeddings) -> TextVariants | None:
    """Return the embedded variants of captions, whose texts are made again by the recorded seed and rules."""
    number = embeddings.num_each(Kind.VARIANTS) if embeddings.has_texts else 0
    if not number:
        return None
    made = {} if embeddings.sidecar is None else embeddings.sidecar.settings
    rules = made.get("text_variant_rules")
    seed = made.get("seed")
    if rules == RULES and made.get("text_variants") == number and isinstance(seed, int):
        return TextVariants(number, seed)
    recorded = "no rules" if rules is None else f"rules {rules} for {made.get('text_variants')} variants, seed {seed}"
    raise ClipcidError(
        f"{embeddings.folder} holds {number} text variants of each row, but embed.json records {recorded}; this version "
        f"makes texts by rules {RULES}.",
        f"Add --extra-texts 0, or run: {_embed_again(settings, embeddings, text_variants=number)}",
    )


def _find_extra_texts(settings: DistillSettings, embeddings: Embeddings, reporter: Reporter) -> ExtraTexts | None:
    """Find the further texts of a run: of `embed --texts`, and where there are none the embedded variants of captions."""
    if not settings.shows_extra_texts:
        return None
    spec = None if embeddings.model is None else embeddings.model.spec
    folder = settings.texts
    if folder is None and spec is not None:
        kept = WorkDirectory(settings.work).texts(parse_model(spec).slug)
        folder = kept if (kept / "texts.json").exists() else None
    if folder is not None:
        texts = open_texts(folder, spec)
        _validate_texts(settings, texts, embeddings)
        reporter.note(f"Extra texts, for the text tower alone: of {folder}, {len(texts.rows):,} texts.")
        return ExtraTexts(texts.rows, texts.lines, None, settings.extra_texts, texts.fingerprints())
    variants = _known_variants(settings, embeddings)
    if variants is not None:
        reporter.note(
            f"Extra texts, for the text tower alone: of the {variants.number} variants of each sample's captions."
        )
        return ExtraTexts(embeddings.rows(Kind.VARIANTS), None, variants, settings.extra_texts, [])
    if settings.extra_texts is None:
        return None
    raise ClipcidError(
        f"--extra-texts {settings.extra_texts}, but there are no texts: neither of `embed --texts` in "
        f"{settings.work}/texts, nor variants of captions in {embeddings.folder}.",
        f"Run: {texts_command(spec, work=settings.work)}\n"
        f"Or run: {_embed_again(settings, embeddings, text=True, text_variants=4)}",
    )


def _validate_texts(settings: DistillSettings, texts: EmbeddedTexts, embeddings: Embeddings) -> None:
    """Refuse texts that another model embedded."""
    made = texts.sidecar.model
    model = embeddings.model
    if texts.rows.shape[1] == embeddings.width and (model is None or made.weights_hash == model.weights_hash):
        return
    of = "another tool's" if model is None else f"of {model.spec}, other weights"
    again = texts_command(None if model is None else model.spec, out=texts.folder, overwrite=True)
    without = "Add" if settings.texts is None else "Omit --texts and add"
    raise ClipcidError(
        f"The texts in {texts.folder} were embedded by {made.spec}, width {texts.rows.shape[1]}; "
        f"the embeddings in {embeddings.folder} are {of}, width {embeddings.width}.",
        f"{without} --extra-texts 0, or run: {again}",
    )


def validate_views(
    settings: DistillSettings, folder: Path, sidecar: EmbedSidecar | None, views: int, model: str | None = None
) -> None:
    """Refuse embeddings without views where these were asked for by name; those of `model` are to be made."""
    if settings.views != "stored" or views:
        return
    more: dict[str, Any] = {"views": 4, "view_kind": ("mix",), "fast_decode": False}
    if sidecar is None:
        more |= {"work": settings.work} | ({"model": model} if model else {})
    raise ClipcidError(
        f"--views stored, but {folder} holds no views.",
        f"Omit --views stored, or run: {data_command(folder, sidecar, settings.data, **settings.data_flags, **more)}",
    )
