"""Further texts of a run, for the text tower alone: the embedded variants of captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

from clipcid_cli.algorithms.losses.registry import LossEntry
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.index import SampleRef
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.embeddings.rows import Rows
from clipcid_cli.runtime.text_variants import RULES, TextVariants
from clipcid_cli.steps import reporting
from clipcid_cli.steps.settings.distill import DistillSettings


class ExtraText(NamedTuple):
    """A further text, as it is sent to a worker: its row among those embedded, and the sample of which it is a variant."""

    row: int
    sample: SampleRef


@dataclasses.dataclass(frozen=True)
class ExtraTexts:
    """Texts without images that a run can show, and the teacher's rows of them."""

    rows: Rows  # the teacher's embeddings of all of them
    variants: TextVariants
    number: int | None  # texts a step, over all processes; None for as many as the batch has samples

    def read(self, text: ExtraText) -> str:
        sample = text.sample.read()
        return self.variants(sample.captions, sample.key, text.row % self.variants.number)


def find_extra_texts(
    settings: DistillSettings, losses: Collection[LossEntry], embeddings: Embeddings
) -> ExtraTexts | None:
    """Find the further texts of a run with such losses; None where none of them takes any, or there are no texts."""
    if not settings.shows_extra_texts(losses):
        if settings.shows_extra_texts(settings.losses):
            takers = [loss.name for loss in settings.losses if loss.teaches_extra_texts]
            reporting.note(f"No extra texts are shown: without {' and '.join(takers)} no loss takes them.")
        return None
    num_variants = embeddings.num_each(Kind.VARIANTS) if embeddings.has_texts else 0
    if num_variants:
        variants = _find_variants(settings, embeddings, num_variants)
        reporting.note(
            f"Extra texts, for the text tower alone: from the {num_variants} variants of each sample's captions."
        )
        return ExtraTexts(embeddings.rows(Kind.VARIANTS), variants, settings.extra_texts)
    if settings.extra_texts is None:
        return None
    raise ClipcidError(
        f"--extra-texts {settings.extra_texts}, but there are no texts: {embeddings.folder} holds no variants of captions.",
        embeddings.embed_again(text=True, text_variants=4),
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
        f"Add --extra-texts 0, or make them anew. {embeddings.embed_again(text_variants=count)}",
    )
