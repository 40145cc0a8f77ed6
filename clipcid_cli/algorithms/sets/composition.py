"""The composition of a data set before and after images are dropped: shares of its classes, or of words in its captions.

Letters: N images, C classes or words.

Source: [O].
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from clipcid_cli.algorithms.near.exact import IntArray

BoolArray = npt.NDArray[np.bool_]

_SHORTEST_WORD = 3
# English words of three letters and more that do not describe an image.
_ENGLISH = (
    "about above after again all also and any are because been before being below between both but can could did does "
    "doing down during each few for from further had has have having her here hers him his how into its itself just may "
    "might more most much must nor not now off once only other our out over own per same she should some such than that "
    "the their them then there these they this those through too under until upon very via was were what when where which "
    "while who whom why will with within without would you your"
)
_STOP_WORDS = frozenset(_ENGLISH.split())


@dataclasses.dataclass(frozen=True)
class Change:
    """How many images have a class or a word, before and after, and which share of those that have any."""

    name: str
    before: int
    after: int
    share_before: float
    share_after: float


@dataclasses.dataclass(frozen=True)
class CaptionWords:
    """The words of N captions.

    Attributes:
        words: Distinct lower-case words, W of them.
        caption: Caption of each of P occurrences of words, int64 [P] in [0, N).
        word: The word, int64 [P] in [0, W).
        has_caption: Which of the images have a caption, bool [N].
        kept: Which of them are kept, bool [N].
    """

    words: list[str]
    caption: IntArray
    word: IntArray
    has_caption: BoolArray
    kept: BoolArray


@dataclasses.dataclass(frozen=True)
class Composition:
    """Counts of classes, or of words, before and after.

    Attributes:
        names: Classes or words, C of them.
        before: Images that have each, int64 [C].
        after: Those of them that are kept, int64 [C].
        num_before: Images that have a class or a caption.
        num_after: Those of them that are kept.
    """

    names: list[str]
    before: IntArray
    after: IntArray
    num_before: int
    num_after: int

    def largest_changes(self, number: int) -> tuple[list[Change], list[Change]]:
        """Return those whose share rose most and those whose share fell most, the largest change first, ties in order."""
        before, after = self.before / max(1, self.num_before), self.after / max(1, self.num_after)
        columns = zip(
            self.names, self.before.tolist(), self.after.tolist(), before.tolist(), after.tolist(), strict=True
        )
        changes, rise = [Change(*each) for each in columns], after - before
        falling, rising = np.argsort(rise, kind="stable"), np.argsort(-rise, kind="stable")
        risen, fallen = rising[rise[rising] > 0][:number].tolist(), falling[rise[falling] < 0][:number].tolist()
        return [changes[at] for at in risen], [changes[at] for at in fallen]


def compose_classes(labels: IntArray, kept: BoolArray, names: list[str]) -> Composition:
    """Count classes.

    Args:
        labels: Class of each image, int64 [N] in [0, C).
        kept: Which images are kept, bool [N].
        names: Names of the classes, C of them.
    """
    before, after = (np.bincount(each, minlength=len(names)) for each in (labels, labels[kept]))
    return Composition(names, before, after, len(labels), int(np.count_nonzero(kept)))


def compose_words(parts: Iterable[CaptionWords]) -> Composition:
    """Count the images whose caption has a word, for every word of three letters or more but `_STOP_WORDS`.

    Returns:
        The words in the order of their characters.
    """
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    num_before = num_after = 0
    for part in parts:
        num_before += int(np.count_nonzero(part.has_caption))
        num_after += int(np.count_nonzero(part.has_caption & part.kept))
        is_counted = [len(word) >= _SHORTEST_WORD and word not in _STOP_WORDS for word in part.words]
        chosen = np.array(is_counted, np.bool_)[part.word]
        # Each pair of a caption and a word once, however often the word occurs in it.
        pairs = np.unique(part.caption[chosen] * len(part.words) + part.word[chosen])
        caption_P, word_P = np.divmod(pairs, max(1, len(part.words)))
        for total, found in zip(counts, (word_P, word_P[part.kept[caption_P]]), strict=True):
            word, number = np.unique(found, return_counts=True)
            total.update(dict(zip((part.words[at] for at in word.tolist()), number.tolist(), strict=True)))
    names = sorted(counts[0])
    before, after = (np.array([total[name] for name in names], np.int64) for total in counts)
    return Composition(names, before, after, num_before, num_after)
