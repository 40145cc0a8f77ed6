"""Variants of captions: which parts they hold, in which order, and that they follow from seed, key and number alone."""

from __future__ import annotations

import random
from collections import Counter

from clipcid_cli.runtime.text_variants import TextVariants, vary_caption

KEYWORDS = "woman student with medium skin tone, graduation, female, human, women"
PROSE = "A dog runs on the beach, wet and happy, at noon. Two cats sleep! It was shot on film, in 1,000 frames."


def variants_of(caption: str, count: int = 400) -> Counter[str]:
    return Counter(vary_caption(caption, random.Random(seed).random) for seed in range(count))


def test_keywords_are_dropped_one_by_one_and_shuffled() -> None:
    found = [text.split(", ") for text in variants_of(KEYWORDS).elements()]
    for kept in found:
        assert len(set(kept)) == len(kept)
        assert set(kept) <= set(KEYWORDS.split(", "))
    sizes = Counter(map(len, found))
    assert set(sizes) == {1, 2, 3, 4, 5}
    # Each part is kept with probability ½, and one where none is: 400 · 5 / 2 parts and 400 / 32 more.
    assert 900 < sum(size * count for size, count in sizes.items()) < 1125
    pairs = [kept for kept in found if {"female", "human"} <= set(kept)]
    assert 0.3 < sum(kept.index("female") < kept.index("human") for kept in pairs) / len(pairs) < 0.7


def test_prose_loses_sentences_and_clauses_but_keeps_its_order() -> None:
    found = variants_of(PROSE)
    assert {"Two cats sleep!", "A dog runs on the beach, at noon. Two cats sleep!", "wet and happy."} <= set(found)
    for text in found:
        assert text[-1] in ".!"
        places = [PROSE.index(part) for part in text.rstrip(".!").replace("! ", ", ").replace(". ", ", ").split(", ")]
        assert places == sorted(places)
    assert all("1,000 frames" in text for text in found if "1" in text), "a number is not cut"
    first, second = "a man with a red hat and a very long coat", "looking out over the sea at dusk"
    assert variants_of(f"{first}, {second}").keys() == {f"{first}, {second}", first, second}


def test_they_follow_from_seed_key_and_number() -> None:
    texts = [TextVariants(3, seed=5)([KEYWORDS], "key", number) for number in range(3)]
    # Written down: embeddings of other machines and versions must stay those of these very texts.
    assert texts == ["female", "female, women, graduation", "female"]
    assert texts == [TextVariants(9, seed=5)([KEYWORDS], "key", number) for number in range(3)]
    assert len({TextVariants(3, seed)([KEYWORDS], key, 0) for seed in range(4) for key in "abcd"}) > 8
    several = {TextVariants(3, seed=5)(["one", "two", "three"], str(key), 0) for key in range(40)}
    assert several == {"one", "two", "three"}, "of several captions, any is varied"
