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
    """The share of one class or word in the data, before and after.

    Attributes:
        name: Name of the class, or the word.
        after: Those of them that are kept.
        share_before: `before` as a share of all images that have a class or a caption, in [0, 1].
        share_after: `after` as a share of those of them that are kept, in [0, 1].
    """

    name: str
    before: int
    after: int
    share_before: float
    share_after: float

    @property
    def rise(self) -> float:
        """By how much the share grew; negative where it shrank."""
        return self.share_after - self.share_before


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
        rise = after - before

        def pick(order: IntArray) -> list[Change]:
            return [
                Change(self.names[at], int(self.before[at]), int(self.after[at]), float(before[at]), float(after[at]))
                for at in order[:number].tolist()
            ]

        falling, rising = np.argsort(rise, kind="stable"), np.argsort(-rise, kind="stable")
        return pick(rising[rise[rising] > 0]), pick(falling[rise[falling] < 0])


def compose_classes(labels: IntArray, kept: BoolArray, names: list[str]) -> Composition:
    """Count classes.

    Args:
        labels: Class of each image, int64 [N] in [0, C).
        kept: Which images are kept, bool [N].
        names: Names of the classes, C of them.
    """
    before, after = np.bincount(labels, minlength=len(names)), np.bincount(labels[kept], minlength=len(names))
    return Composition(names, before, after, len(labels), int(np.count_nonzero(kept)))


def compose_words(parts: Iterable[CaptionWords]) -> Composition:
    """Count the images whose caption has a word, for every word of three letters or more but `_STOP_WORDS`.

    Args:
        parts: Captions in any number of parts.

    Returns:
        The words in the order of their characters.
    """
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    num_before = num_after = 0
    for part in parts:
        num_before += int(np.count_nonzero(part.has_caption))
        num_after += int(np.count_nonzero(part.has_caption & part.kept))
        is_counted = np.array(
            [len(word) >= _SHORTEST_WORD and word not in _STOP_WORDS for word in part.words], np.bool_
        )
        chosen = is_counted[part.word]
        # Each pair of a caption and a word once, however often the word occurs in it.
        pairs = np.unique(part.caption[chosen] * len(part.words) + part.word[chosen])
        caption_P, word_P = np.divmod(pairs, max(1, len(part.words)))
        for counts, found in ((before, word_P), (after, word_P[part.kept[caption_P]])):
            count = np.bincount(found, minlength=len(part.words))
            counts.update({part.words[word]: int(count[word]) for word in np.flatnonzero(count).tolist()})
    names = sorted(before)
    return Composition(
        names,
        np.array([before[name] for name in names], np.int64),
        np.array([after[name] for name in names], np.int64),
        num_before,
        num_after,
    )
