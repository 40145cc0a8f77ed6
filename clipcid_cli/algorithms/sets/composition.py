"""What a data set is made of, before and after images are dropped: shares of its classes, or of the words of its captions.

Letters: N images, C classes or words.

Source: [O].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipcid_cli.algorithms.search.distances import IntArray

BoolArray = npt.NDArray[np.bool_]

_SHORTEST_WORD = 3
# English words of three letters and more that say nothing of what an image shows.
_STOP_WORDS = (
    "about above after again all also and any are because been before being below between both but can could did does "
    "doing down during each few for from further had has have having her here hers him his how into its itself just may "
    "might more most much must nor not now off once only other our out over own per same she should some such than that "
    "the their them then there these they this those through too under until upon very via was were what when where which "
    "while who whom why will with within without would you your"
)


@dataclasses.dataclass(frozen=True)
class Change:
    """How much of the data one class or word is, before and after.

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


def compose_words(parts: Iterable[tuple[pa.Array, BoolArray]]) -> Composition:
    """Count the images whose caption has a word, for every word of three letters or more but `_STOP_WORDS`.

    Args:
        parts: Captions, N strings of which empty ones count as none, and which of their images are kept, bool [N]; in as
            many parts as one likes.

    Returns:
        The words lower-cased and in the order of their characters.
    """
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    num_before = num_after = 0
    for captions, kept in parts:
        has_caption = np.asarray(pc.not_equal(captions, "").to_numpy(zero_copy_only=False), np.bool_)
        num_before += int(np.count_nonzero(has_caption))
        num_after += int(np.count_nonzero(has_caption & kept))
        words, row_P, word_P = _find_words(captions)
        for counts, found in ((before, word_P), (after, word_P[kept[row_P]])):
            for word, count in zip(words, np.bincount(found, minlength=len(words)).tolist(), strict=True):
                counts[word] = counts.get(word, 0) + count
    names = sorted(before)
    return Composition(
        names,
        np.array([before[name] for name in names], np.int64),
        np.array([after[name] for name in names], np.int64),
        num_before,
        num_after,
    )


def _find_words(captions: pa.Array) -> tuple[list[str], IntArray, IntArray]:
    """Return the words that occur, and each pair of a caption and a word in it once, int64 [P] each."""
    lists = pc.split_pattern_regex(pc.utf8_lower(captions), r"[^\p{L}\p{M}]+")
    encoded = pc.list_flatten(lists).dictionary_encode()
    row, word = pc.list_parent_indices(lists).to_numpy(), encoded.indices.to_numpy().astype(np.int64)
    names = encoded.dictionary
    is_of_use = pc.and_not(
        pc.greater_equal(pc.utf8_length(names), _SHORTEST_WORD),
        pc.is_in(names, value_set=pa.array(_STOP_WORDS.split(), names.type)),
    ).to_numpy(zero_copy_only=False)
    number = np.cumsum(is_of_use) - 1
    chosen = is_of_use[word]
    pairs = np.unique(row[chosen] * len(names) + number[word[chosen]])
    row_P, word_P = np.divmod(pairs, max(1, len(names)))
    return names.filter(pa.array(is_of_use)).to_pylist(), row_P, word_P
