"""Which texts a sample may show: its first caption, all of them, variants of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.command import data_command
from clipcid_cli.formats.embeddings.folder import Embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.text_variants import RULES, TextVariants
from clipcid_cli.steps.distill.samples import MatchCounts
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.distill import DistillSettings


@dataclasses.dataclass(frozen=True)
class ShownCaption:
    """A text, which of the sample's captions it is, and which of its variants; −1 where it is none."""

    text: str
    number: int = 0
    variant: int = -1


@dataclasses.dataclass(frozen=True)
class CaptionChooser:
    """Chooses the text that a sample shows in an epoch, in a worker.

    Attributes:
        first_only: Always show the first caption, or a variant.
        dropout: Probability with which a comma-separated part of a caption, but the first, is omitted.
        variants: The variants of captions that are embedded; None for none.
        variant_share: Probability with which one of them is shown.
    """

    seed: int
    first_only: bool
    dropout: float
    variants: TextVariants | None
    variant_share: float

    def __call__(self, captions: Sequence[str], key: str, epoch: int) -> ShownCaption:
        """Choose one of a sample's captions, or a variant of one."""
        if self.variants is not None:
            random = np.random.default_rng(derive_seed("variant", self.seed, epoch, key))
            if random.uniform() < self.variant_share:
                variant = int(random.integers(self.variants.number))
                return ShownCaption(self.variants(captions, key, variant), variant=variant)
        if self.first_only or (len(captions) == 1 and not self.dropout):
            return ShownCaption(captions[0])
        random = np.random.default_rng(derive_seed("caption", self.seed, epoch, key))
        number = int(random.integers(len(captions)))
        if not self.dropout:
            return ShownCaption(captions[number], number)
        first, *others = captions[number].split(",")
        kept = [part for part in others if random.uniform() >= self.dropout]
        return ShownCaption(",".join([first, *kept]), number)


def has_all_captions(
    settings: DistillSettings, embeddings: Embeddings, counts: MatchCounts, reporter: Reporter
) -> bool:
    """Tell whether the teacher embedded every caption of every sample."""
    if not (counts.several_captions and embeddings.has_texts):
        return False
    if Kind.FURTHER not in embeddings.kinds:
        reporter.note("Captions: only the first of each sample is embedded, so only the first is shown.")
        return False
    _refuse_changed(settings, embeddings, counts)
    reporter.note(f"Captions: {counts.captions:,} of {counts.selected:,} samples, one drawn in each epoch.")
    return True


def _refuse_changed(settings: DistillSettings, embeddings: Embeddings, counts: MatchCounts) -> None:
    if counts.changed is not None:
        key, now, embedded = counts.changed
        raise ClipcidError(
            f"Sample {key!r} has {now} captions, but {embedded} were embedded in {embeddings.folder}: the data has changed.",
            "Run: " + data_command(embeddings.folder, embeddings.sidecar, settings.data, **settings.data_flags),
        )


def find_text_variants(
    settings: DistillSettings, embeddings: Embeddings, counts: MatchCounts, reporter: Reporter
) -> TextVariants | None:
    """Return the embedded variants of captions; None where there are none, or none are used: shown, or as further texts."""
    number = embeddings.num_each(Kind.VARIANTS) if embeddings.has_texts else 0
    share = settings.variant_share
    if not number or not (share or settings.shows_extra_texts):
        return None
    made = {} if embeddings.sidecar is None else embeddings.sidecar.settings
    rules, seed = made.get("text_variant_rules"), made.get("seed")
    if rules != RULES or made.get("text_variants") != number or not isinstance(seed, int):
        recorded = (
            "no rules" if rules is None else f"rules {rules} for {made.get('text_variants')} variants, seed {seed}"
        )
        raise ClipcidError(
            f"{embeddings.folder} holds {number} text variants of each row, but embed.json records {recorded}; this version "
            f"makes texts by rules {RULES}.",
            "Add --text-variant-share 0 --extra-texts 0, or run: "
            + data_command(
                embeddings.folder, embeddings.sidecar, settings.data, **settings.data_flags, text_variants=number
            ),
        )
    _refuse_changed(settings, embeddings, counts)
    if share:
        reporter.note(
            f"Text variants: {number} of each image's captions are embedded and shown, {share:.0%} of the time."
        )
    return TextVariants(number, seed)
