"""What a repair does: it brings images that were turned away back, and leaves sound teachers and noise alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from balance_data import unit
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.pairing import Pairs, are_enough
from clipcid_cli.algorithms.repair import (
    RULE,
    Rule,
    can_be_divided,
    deal_groups,
    fit_repair,
    group_pairs,
    standard_error,
)
from clipcid_cli.records import Repair

WIDTH, SCALE = 32, 50.0


def make_pairs(seed: int, *, num_pairs: int = 400, num_captions: int = 130) -> Pairs:
    """Make pairs of a sound teacher: images lie around their captions, which repeat."""
    random = np.random.default_rng(seed)
    captions = unit(random.normal(size=(num_captions, WIDTH)))
    number = random.integers(num_captions, size=num_pairs)
    images = unit(captions[number] + 0.1 * random.normal(size=(num_pairs, WIDTH)))
    return Pairs(*(torch.from_numpy(rows).float() for rows in (images, captions[number])), torch.from_numpy(number))


def make_captioned(seed: int, *, num_images: int = 60, noise: float = 0.25) -> Pairs:
    """Make pairs of a sound teacher where each image has five captions of its own: their rows lie around the image's."""
    random = np.random.default_rng(seed)
    images = unit(random.normal(size=(num_images, WIDTH))).repeat(5, axis=0)
    texts = unit(images + noise * random.normal(size=images.shape))
    return Pairs(*(torch.from_numpy(rows).float() for rows in (images, texts)), torch.arange(len(images)))


def repair(pairs: Pairs) -> Repair:
    figures, _ = fit_repair(pairs, SCALE, seed=0)
    return figures


def test_a_rotated_teacher_is_brought_back_by_a_map_that_multiplies_float16_rows_without_error() -> None:
    pairs = make_pairs(1)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
    turned = dataclasses.replace(pairs, images_ND=pairs.images_ND @ torch.from_numpy(rotation).float())
    found, map_DD = fit_repair(turned, SCALE, seed=0)
    assert found.repaired
    assert map_DD is not None
    assert found.recall_at_1[0] < 0.1
    assert found.recall_at_1[1] > 0.3
    assert found.log_rank[1] < found.log_rank[0]
    rows = torch.nn.functional.normalize(torch.randn(50, WIDTH)).half().double()
    wide = map_DD.double()
    sums = sum((rows[:, [place]] * wide[place] for place in reversed(range(WIDTH))), torch.zeros(50, WIDTH))
    torch.testing.assert_close(rows @ wide, sums, rtol=0, atol=0)


@pytest.mark.parametrize("exchanged", [0.0, 0.2, 0.5, 0.8])
def test_a_sound_teacher_stays_whatever_share_of_the_captions_is_wrong(exchanged: float) -> None:
    pairs = make_pairs(2, num_captions=130 if exchanged == 0.0 else 400)
    random = np.random.default_rng(2)
    places = np.arange(len(pairs))
    wrong = np.flatnonzero(random.uniform(size=len(pairs)) < exchanged)
    places[wrong] = random.permutation(wrong)
    other = pairs.take(torch.from_numpy(places))
    found = repair(Pairs(pairs.images_ND, other.texts_ND, other.captions_N))
    assert not found.repaired
    assert exchanged > 0.0 or found.recall_at_1[0] > 0.8


@pytest.mark.parametrize("num_captions", [40, 600])
@pytest.mark.parametrize("seed", range(2))
def test_noise_is_not_followed(num_captions: int, seed: int) -> None:
    """Neither where captions differ nor where few of them, some much more frequent, serve all images."""
    random = np.random.default_rng(seed)
    captions = unit(random.normal(size=(num_captions, WIDTH)))
    number = (num_captions * random.uniform(size=400) ** 2).astype(np.int64)
    images = unit(random.normal(size=(400, WIDTH)) + 0.5)
    pairs = Pairs(*(torch.from_numpy(rows).float() for rows in (images, captions[number])), torch.from_numpy(number))
    assert not repair(pairs).repaired


@given(st.integers(0, 2**31), st.integers(4, 400))
@settings(max_examples=20)
def test_no_caption_is_in_two_folds(seed: int, num_captions: int) -> None:
    captions = make_pairs(seed, num_captions=num_captions).captions_N
    folds = deal_groups(captions, seed)
    for caption in captions.unique():
        assert len(folds[captions == caption].unique()) == 1
    assert set(folds.tolist()) == set(range(min(5, len(captions.unique()) // 2)))


@given(st.integers(0, 2**31), st.integers(40, 400), st.integers(40, 400))
@settings(max_examples=20)
def test_neither_image_nor_caption_is_in_two_folds(seed: int, num_captions: int, num_images: int) -> None:
    pairs = make_pairs(seed, num_pairs=100, num_captions=num_captions)
    image_N = torch.from_numpy(np.random.default_rng(seed).integers(num_images, size=100)) % 100
    pairs = dataclasses.replace(pairs, images_ND=pairs.images_ND[image_N])
    groups = group_pairs(pairs)
    for numbers in (pairs.captions_N, image_N):
        for number in numbers.unique():
            assert len(groups[numbers == number].unique()) == 1
    # And no more is tied together than that: each group is reached from its first pair.
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        reached = members[:1]
        for _ in members:
            reached = members[
                torch.isin(pairs.captions_N[members], pairs.captions_N[reached])
                | torch.isin(image_N[members], image_N[reached])
            ]
        assert len(reached) == len(members)


def test_another_caption_of_an_image_is_no_wrong_answer() -> None:
    found = repair(make_captioned(0))
    assert found.recall_at_1[0] > 0.95  # by one caption of five it would be a fifth
    assert math.exp(found.log_rank[0]) < 1.1
    assert found.chance_at_1 == pytest.approx(5 / (len(make_captioned(0)) / 5), rel=0.1)
    assert not found.repaired


def turn(pairs: Pairs, share: float) -> Pairs:
    """Turn the images away from their captions, by a share of a whole rotation."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
    turned = (1 - share) * torch.eye(WIDTH) + share * torch.from_numpy(rotation).float()
    return dataclasses.replace(pairs, images_ND=torch.nn.functional.normalize(pairs.images_ND @ turned))


def test_a_clear_but_small_gain_is_not_taken() -> None:
    pairs = turn(make_pairs(3), 0.6)
    significant, map_DD = fit_repair(pairs, SCALE, 0, Rule(rank_falls_by=1.0, recall_rises_by=0.0))
    assert significant.repaired
    assert map_DD is not None
    assert significant.recall_at_1[0] > 0.5
    assert not repair(pairs).repaired


def test_a_large_but_unclear_gain_is_not_taken() -> None:
    pairs = turn(make_pairs(3), 1.0)
    assert repair(pairs).repaired
    unclear, map_DD = fit_repair(pairs, SCALE, 0, Rule(standard_errors=1e6))
    assert not unclear.repaired
    assert map_DD is None


@pytest.mark.parametrize(
    ("fall", "recall_at_1", "large"),
    [
        (2.1, (0.3, 0.5), True),
        (1.9, (0.3, 0.5), False),
        (2.1, (0.4, 0.5), False),
        (2.1, (0.0, 0.0), False),
        (9.0, (0.7, 1.0), False),
    ],
)
def test_a_large_gain_halves_the_rank_and_raises_recall_by_half(
    fall: float, recall_at_1: tuple[float, float], large: bool
) -> None:
    assert RULE.is_large(math.log(fall), recall_at_1) == large


def test_pairs_that_are_all_tied_together_are_not_divided() -> None:
    pairs = make_pairs(0)
    assert can_be_divided(pairs)
    one_image = dataclasses.replace(pairs, images_ND=pairs.images_ND[:1].expand(len(pairs), -1))
    assert are_enough(one_image)
    assert not can_be_divided(one_image)


@pytest.mark.parametrize("sizes", [[300] + 9 * [12], [150] + 10 * [12], [5, 5, 5, 900]])
def test_a_frequent_caption_leaves_at_least_two_folds(sizes: list[int]) -> None:
    pairs = make_pairs(0, num_pairs=sum(sizes), num_captions=len(sizes))
    pairs = dataclasses.replace(pairs, captions_N=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)))
    for seed in range(4):
        assert len(deal_groups(pairs.captions_N, seed).unique()) >= 2
    assert repair(pairs).pairs == sum(sizes)


@pytest.mark.parametrize(
    ("num_pairs", "num_captions", "enough"),
    [(100, 100, False), (1_500, 3, False), (0, 1, False), (1_500, 4, True), (300, 300, True)],
)
def test_too_few_pairs_or_captions_are_not_judged(num_pairs: int, num_captions: int, enough: bool) -> None:
    assert are_enough(make_pairs(0, num_pairs=num_pairs, num_captions=num_captions)) == enough


def test_standard_error_is_that_of_the_captions_where_their_pairs_agree() -> None:
    captions = torch.arange(6).repeat_interleave(50)
    values = torch.tensor([3.0, 1, 0, 2, 5, 1], dtype=torch.float64)
    assert standard_error(values[captions], captions) == pytest.approx(float(values.std()) / 6**0.5)
    single = torch.randn(300, dtype=torch.float64)
    assert standard_error(single, torch.arange(300)) == pytest.approx(float(single.std()) / 300**0.5)
