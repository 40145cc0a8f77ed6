"""What a repair does: it brings images that were turned away back, and leaves sound teachers and noise alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.algorithms.repair import Pairs, Repair, fit_repair, split_by_caption

WIDTH, SCALE = 64, 50.0
SEEDS = st.integers(0, 2**31)


def make_pairs(seed: int, *, num_pairs: int = 1_500, num_captions: int = 300, noise: float = 0.1) -> Pairs:
    """Make pairs of a sound teacher: images lie around their captions, which repeat."""
    random = np.random.default_rng(seed)
    captions = unit(random.normal(size=(num_captions, WIDTH)))
    number = random.integers(num_captions, size=num_pairs)
    images = unit(captions[number] + noise * random.normal(size=(num_pairs, WIDTH)))
    return Pairs(*(torch.from_numpy(rows).float() for rows in (images, captions[number])), torch.from_numpy(number))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def turn(pairs: Pairs, seed: int) -> Pairs:
    """Rotate the images, all by the same."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, WIDTH)))[0]
    return dataclasses.replace(pairs, images_ND=pairs.images_ND @ torch.from_numpy(rotation).float())


def repair(pairs: Pairs, seed: int = 0) -> Repair:
    split = split_by_caption(pairs, seed)
    assert split is not None
    return fit_repair(*split, SCALE, seed)


@given(SEEDS)
@settings(max_examples=5)
def test_a_rotated_teacher_is_brought_back(seed: int) -> None:
    found = repair(turn(make_pairs(seed), seed))
    assert found.map_DD is not None
    assert found.recall_at_1[0] < 0.1
    assert found.recall_at_1[1] > 0.3
    assert found.log_rank[1] < found.log_rank[0]


@given(SEEDS)
@settings(max_examples=5)
def test_a_sound_teacher_stays(seed: int) -> None:
    found = repair(make_pairs(seed))
    assert found.map_DD is None
    assert found.recall_at_1[0] > 0.8


@pytest.mark.parametrize("num_captions", [40, 1_500])
@given(SEEDS)
@settings(max_examples=5)
def test_noise_is_not_followed(num_captions: int, seed: int) -> None:
    """Neither where captions differ nor where few of them, some much more frequent, serve all images."""
    random = np.random.default_rng(seed)
    captions = unit(random.normal(size=(num_captions, WIDTH)))
    number = (num_captions * random.uniform(size=1_500) ** 2).astype(np.int64)
    images = unit(random.normal(size=(1_500, WIDTH)) + 0.5)
    pairs = Pairs(*(torch.from_numpy(rows).float() for rows in (images, captions[number])), torch.from_numpy(number))
    assert repair(pairs).map_DD is None


@pytest.mark.parametrize("exchanged", [0.2, 0.5, 0.8])
@given(SEEDS)
@settings(max_examples=3)
def test_a_sound_teacher_of_wrong_captions_stays(exchanged: float, seed: int) -> None:
    pairs, random = make_pairs(seed, num_captions=1_500), np.random.default_rng(seed)
    places = np.arange(len(pairs))
    wrong = np.flatnonzero(random.uniform(size=len(pairs)) < exchanged)
    places[wrong] = random.permutation(wrong)
    other = pairs.take(torch.from_numpy(places))
    assert repair(Pairs(pairs.images_ND, other.texts_ND, other.captions_N)).map_DD is None


@given(SEEDS)
@settings(max_examples=20)
def test_no_caption_is_on_both_sides(seed: int) -> None:
    pairs = make_pairs(seed, num_captions=40)
    split = split_by_caption(pairs, seed)
    assert split is not None
    fitted, held_out = split
    assert not np.intersect1d(fitted.captions_N.numpy(), held_out.captions_N.numpy()).size
    assert len(fitted) + len(held_out) == len(pairs)
    assert len(held_out) >= 0.2 * len(pairs)


@pytest.mark.parametrize(("num_pairs", "num_captions"), [(100, 100), (1_500, 3), (1_500, 1), (0, 1)])
def test_too_few_pairs_or_captions_are_not_judged(num_pairs: int, num_captions: int) -> None:
    assert split_by_caption(make_pairs(0, num_pairs=num_pairs, num_captions=num_captions), 0) is None


def test_the_map_multiplies_float16_rows_without_error() -> None:
    found = repair(turn(make_pairs(1), 1)).map_DD
    assert found is not None
    rows = torch.nn.functional.normalize(torch.randn(50, WIDTH)).half().double()
    sums = sum((rows[:, [place]] * found.double()[place] for place in reversed(range(WIDTH))), torch.zeros(50, WIDTH))
    torch.testing.assert_close(rows @ found.double(), sums, rtol=0, atol=0)


def test_the_same_bytes_again() -> None:
    pairs = turn(make_pairs(2), 2)
    one, two = repair(pairs), repair(pairs)
    assert one.map_DD is not None
    assert two.map_DD is not None
    assert torch.equal(one.map_DD, two.map_DD)
