"""Variants of captions: parts of them dropped and shuffled, a function of seed, key and number alone.

Nothing but the embedding of a variant is stored: whoever has the captions, the key and the seed makes the text again.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence

from clipcid_cli.runtime.randomness import derive_seed

RULES = 1
"""Number of the rules below, recorded beside embeddings of variants: other rules would make other texts."""

_Draw = Callable[[], float]  # numbers in [0, 1)

# Parts of up to so many words in the mean are keywords; longer ones are clauses of prose.
_KEYWORD_WORDS = 4
# Not the comma of 1,000.
_COMMA = re.compile(r"\s*(?:(?<!\d),|,(?!\d)|[;，、；])\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")


@dataclasses.dataclass(frozen=True)
class TextVariants:
    """The variants of each sample's captions, V ≥ 1 in number; picklable."""

    number: int
    seed: int

    def __call__(self, captions: Sequence[str], key: str, variant: int) -> str:
        """Make a variant, 0 … V − 1, of one of a sample's captions."""
        # Python promises the numbers of `random()`, and of nothing else there, for all its versions.
        draw = random.Random(derive_seed("text variant", self.seed, variant, key)).random
        return vary_caption(captions[int(draw() * len(captions))], draw)


def vary_caption(caption: str, draw: _Draw) -> str:
    """Drop parts of a caption, each with probability ½, but never all; of keywords, shuffle what is left.

    Keywords are parts between commas that have at most four words in the mean, in a caption of one sentence without a full
    stop. In prose, whole sentences are dropped and then clauses between commas, in the order that is left. A caption of one
    part is its own variant.
    """
    caption = " ".join(caption.split())
    if caption.endswith((".", "!", "?", "。", "！", "？")) or len(_SENTENCE_END.split(caption)) > 1:
        return " ".join(_drop_clauses(sentence, draw) for sentence in _keep(_SENTENCE_END.split(caption), draw))
    parts = [part for part in _COMMA.split(caption) if part]
    if sum(len(part.split()) for part in parts) > _KEYWORD_WORDS * len(parts):
        return _drop_clauses(caption, draw)
    kept = [(draw(), part) for part in _keep(parts, draw)]
    return ", ".join(part for _, part in sorted(kept))


def _drop_clauses(sentence: str, draw: _Draw) -> str:
    body = sentence.rstrip(".!?。！？")
    clauses = [clause for clause in _COMMA.split(body) if clause]
    return ", ".join(_keep(clauses, draw)) + sentence[len(body) :]


def _keep(parts: Sequence[str], draw: _Draw) -> list[str]:
    """Keep each part with probability ½; where none is left, one of them."""
    kept = [part for part in parts if draw() < 0.5]
    return kept or [parts[int(draw() * len(parts))]] if parts else []
