"""Seeds, shares of keys, orders of samples and variants of captions depend on their arguments only."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.runtime.randomness import (
    SHARDS_MIXED,
    SampleOrder,
    derive_seed,
    epoch_groups,
    key_fractions,
)
from clipcid_cli.runtime.text_variants import TextVariants, vary_caption


def epoch_order(seed: int, epoch: int, shard_sizes: list[int], group: int = SHARDS_MIXED) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *epoch_groups(seed, epoch, shard_sizes, group)])


def test_they_are_the_same_on_every_machine() -> None:
    # Written down once: a change of these numbers changes every user's sample order and hold-out.
    assert derive_seed("epoch", 0, 1) == 5429471261494044530
    assert round(float(key_fractions(["000000001"])[0]), 12) == 0.766953541088
    assert derive_seed("a", "bc") != derive_seed("ab", "c")
    assert SampleOrder(1, [3, 0, 4, 2]).rows(3, 13).tolist() == [5, 2, 1, 8, 6, 0, 3, 5, 6, 1]
    rows = SampleOrder(5, [3, 1] * 20).rows(70, 90).tolist()
    assert rows == [38, 55, 24, 37, 21, 42, 26, 36, 22, 41, 46, 44, 43, 24, 2, 6, 26, 17, 11, 72]


def test_shares_of_many_keys_are_those_of_each() -> None:
    keys = [f"é{number}" for number in range(20_000)]
    fractions = key_fractions(keys)
    assert fractions[:1000].tolist() == [key_fractions([key])[0] for key in keys[:1000]]
    assert 160 < (fractions < 0.01).sum() < 240
    assert key_fractions([]).tolist() == []


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(0, 2**31), st.integers(0, 100), st.integers(1, 8))
def test_an_epoch_holds_every_row_once(shard_sizes: list[int], seed: int, epoch: int, group: int) -> None:
    order = epoch_order(seed, epoch, shard_sizes, group)
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(shard_sizes)))


def test_a_group_reads_few_shards_at_a_time_and_epochs_and_seeds_differ() -> None:
    order = epoch_order(0, 0, [10] * 12, group=3)
    for start in range(0, 120, 30):
        assert len(set(order[start : start + 30] // 10)) == 3
    orders = {tuple(epoch_order(seed, epoch, [50, 50])) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(sum), st.lists(st.integers(0, 150), max_size=8))
@settings(max_examples=40)
def test_any_stretch_is_the_same_wherever_reading_was_before(shard_sizes: list[int], starts: list[int]) -> None:
    order = SampleOrder(3, shard_sizes)
    num_epochs = -(-220 // sum(shard_sizes))
    whole = [int(row) for epoch in range(num_epochs) for row in epoch_order(3, epoch, shard_sizes)]
    for start in starts:  # back and forth, across groups and epochs
        assert order.rows(start, start + 70).tolist() == whole[start : start + 70]


def test_shards_are_announced_a_group_ahead() -> None:
    sizes = [3] * 40 + [0]
    announced: list[list[int]] = []
    order = SampleOrder(5, sizes, lambda shards: announced.append(list(shards)))
    owners = [row // 3 for row in order.rows(0, 2 * 120).tolist()]
    assert len(announced) == 6
    for begin, group in zip((0, 48, 96, 120, 168, 216), announced, strict=True):
        # The last group of an epoch has 8 shards or 9, one of them empty; groups of 16 follow each other otherwise.
        ahead = owners[begin : begin + 48]
        assert set(ahead[:24]) <= set(group)
        assert len(group) <= 32
        assert 40 not in group
    resumed: list[list[int]] = []
    SampleOrder(5, sizes, lambda shards: resumed.append(list(shards))).rows(100, 101)
    assert resumed == announced[2:3]


KEYWORDS = "woman student with medium skin tone, graduation, female, human, women"
PROSE = "A dog runs on the beach, wet and happy, at noon. Two cats sleep! It was shot on film, in 1,000 frames."


def variants_of(caption: str) -> Counter[str]:
    return Counter(vary_caption(caption, random.Random(seed).random) for seed in range(400))


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
