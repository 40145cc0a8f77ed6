"""Further texts of a run, for the text tower alone: lines of `embed --texts`, or else the embedded variants of captions."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.command import texts_command
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.rows import Kind, Rows
from clipcid_cli.formats.embeddings.text_folder import TEXTS, EmbeddedTexts, TextLines, open_texts
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.sidecar import sidecar_path
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.text_variants import RULES, TextVariants
from clipcid_cli.steps import reporting
from clipcid_cli.steps.inputs import choose_texts, embed_again
from clipcid_cli.steps.settings.distill import DistillSettings


class ExtraText(NamedTuple):
    """A further text, as it is sent to a worker: its row among those embedded, and the sample of which it is a variant."""

    row: int
    sample: SampleRef | None = None


@dataclasses.dataclass(frozen=True)
class ExtraTexts:
    """Texts without images that a run can show, and the teacher's rows of them."""

    rows: Rows  # the teacher's embeddings of all of them
    lines: TextLines | None
    variants: TextVariants | None
    number: int | None  # texts a step, over all processes; None for as many as the batch has samples
    fingerprints: list[FileRecord]  # of the files of the lines

    def read(self, text: ExtraText) -> str:
        if self.lines is not None:
            return self.lines[text.row]
        assert self.variants is not None
        assert text.sample is not None
        sample = text.sample.read()
        return self.variants(sample.captions, sample.key, text.row % self.variants.number)


def find_extra_texts(settings: DistillSettings, embeddings: Embeddings, trust: float) -> ExtraTexts | None:
    """Find the further texts of a run; None where no loss takes any at such trust in the teacher, or there are none."""
    if not settings.shows_extra_texts(trust):
        if settings.shows_extra_texts():
            reporting.note("No extra texts are shown: without fd no loss takes them.")
        return None
    # Of several teachers none has embedded the texts of a file for all.
    spec = None if embeddings.model is None or len(embeddings.members) > 1 else embeddings.model.spec
    folder = settings.texts
    if folder is None and spec is not None:
        kept = choose_texts(settings.work, parse_model(spec))
        folder = kept if sidecar_path(kept, TEXTS).exists() else None
    if folder is not None:
        texts = open_texts(folder, spec)
        _validate_model(settings, texts, embeddings)
        reporting.note(f"Extra texts, for the text tower alone: the {len(texts.rows):,} texts of {folder}.")
        return ExtraTexts(texts.rows, texts.lines, None, settings.extra_texts, texts.fingerprints())
    num_variants = embeddings.num_each(Kind.VARIANTS) if embeddings.has_texts else 0
    if num_variants:
        variants = _find_variants(settings, embeddings, num_variants)
        reporting.note(
            f"Extra texts, for the text tower alone: from the {num_variants} variants of each sample's captions."
        )
        return ExtraTexts(embeddings.rows(Kind.VARIANTS), None, variants, settings.extra_texts, [])
    if settings.extra_texts is None:
        return None
    with_variants = embed_again(embeddings, settings, text=True, text_variants=4)
    raise ClipcidError(
        f"--extra-texts {settings.extra_texts}, but there are no texts: neither of `embed --texts` in "
        f"{settings.work}/texts, nor variants of captions in {embeddings.folder}.",
        f"Run: {texts_command(spec, work=settings.work)}\nOr run: {with_variants}",
    )


def _find_variants(settings: DistillSettings, embeddings: Embeddings, count: int) -> TextVariants:
    """Return the embedded variants of captions, whose texts are made again by the recorded seed and rules."""
    recorded = {} if embeddings.sidecar is None else embeddings.sidecar.settings
    rules = recorded.get("text_variant_rules")
    seed = recorded.get("seed")
    if rules == RULES and recorded.get("text_variants") == count and isinstance(seed, int):
        return TextVariants(count, seed)
    made_by = "no rules"
    if rules is not None:
        made_by = f"rules {rules} for {recorded.get('text_variants')} variants, seed {seed}"
    raise ClipcidError(
        f"{embeddings.folder} holds {count} text variants of each row, but embed.json records {made_by}; this version "
        f"makes texts by rules {RULES}.",
        f"Add --extra-texts 0, or run: {embed_again(embeddings, settings, text_variants=count)}",
    )


def _validate_model(settings: DistillSettings, texts: EmbeddedTexts, embeddings: Embeddings) -> None:
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
