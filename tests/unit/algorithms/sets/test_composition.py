"""What a data set is made of, before and after, against counting one caption at a time."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pyarrow as pa

from clipcid_cli.algorithms.sets.composition import CaptionWords, Change, compose_classes, compose_words
from clipcid_cli.formats.data.caption_words import split_words

VOCABULARY = (
    "Red",
    "red",
    "façade",
    "the",
    "of",
    "x",
    "boat",
    "boats",
    "don't",
    "2012",
    "Straße",
    "with",
    "лес",
    "ab1cd",
)


def words_of(captions: list[str], kept: np.ndarray) -> CaptionWords:
    has_caption = np.array([caption != "" for caption in captions], bool)
    return CaptionWords(*split_words(pa.array(captions, pa.large_string())), has_caption, kept)


def test_words_are_counted_once_an_image() -> None:
    generator = np.random.default_rng(0)
    captions = [", ".join(generator.choice(VOCABULARY, generator.integers(0, 7))) for _ in range(500)]
    kept = generator.random(500) < 0.4
    parts = [words_of(captions[part], kept[part]) for part in (slice(0, 333), slice(333, 500))]
    found = compose_words([*parts, words_of([], np.empty(0, bool))])
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    for caption, is_kept in zip(captions, kept, strict=True):
        words = {word for word in re.findall(r"[^\W\d_]+", caption.lower()) if len(word) >= 3} - {"the", "with"}
        before.update(words)
        after.update(words if is_kept else ())
    assert found.names == sorted(before) == ["boat", "boats", "don", "façade", "red", "straße", "лес"]
    assert found.before.tolist() == [before[name] for name in found.names]
    assert found.after.tolist() == [after[name] for name in found.names]
    has_caption = np.array([caption != "" for caption in captions])
    assert (found.num_before, found.num_after) == (has_caption.sum(), (has_caption & kept).sum())


def test_the_largest_changes_of_shares_come_first() -> None:
    labels = np.repeat(np.arange(5), [40, 20, 20, 10, 10])
    kept = np.concatenate([np.arange(count) < left for count, left in ((40, 4), (20, 16), (20, 16), (10, 4), (10, 10))])
    classes = compose_classes(labels, kept, list("abcde"))
    risen, fallen = classes.largest_changes(3)
    assert risen == [
        Change("b", 20, 16, 0.2, 0.32),
        Change("c", 20, 16, 0.2, 0.32),
        Change("e", 10, 10, 0.1, 0.2),
    ]
    assert [change.name for change in fallen] == ["a", "d"]
    assert (fallen[0].share_before, fallen[0].share_after) == (0.4, 0.08)


def test_nothing_to_count() -> None:
    words = compose_words([words_of(["", "of a"], np.array([True, False]))])
    assert (words.names, words.num_before, words.num_after) == ([], 1, 0)
    assert words.largest_changes(3) == ([], [])
    assert compose_words([]).largest_changes(3) == ([], [])
