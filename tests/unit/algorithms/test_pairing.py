"""Whether a teacher knows some data: ranks of the captions' own images, beside a guess."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.pairing import rank_pairs, summarise_ranks
from clipcid_cli.records import Pairing


def make_pairs(count: int, skill: float, repeats: int = 1) -> Pairing:
    """Rank pairs whose captions know their images by so much, each caption that of several images."""
    generator = torch.Generator().manual_seed(0)
    captions = torch.arange(count) // repeats
    known = torch.randn(count, 64, generator=generator)[captions]
    texts = torch.randn(count, 64, generator=generator)[captions] + skill * known
    images = torch.randn(count, 64, generator=generator) + skill * known
    return rank_pairs(*(torch.nn.functional.normalize(rows) for rows in (images, texts)), captions)


@pytest.mark.parametrize("count", [60, 300, 2000])
def test_a_guess_is_near_chance_and_knowledge_is_not(count: int) -> None:
    guessed = make_pairs(count, 0.0)
    assert guessed.near_chance
    assert guessed.median_rank == pytest.approx(guessed.chance_rank, rel=0.25)
    assert guessed.recall_at_10 == pytest.approx(guessed.chance_at_10, rel=0.6)
    assert not make_pairs(count, 0.7).near_chance


def test_images_of_an_equal_caption_are_no_wrong_answer() -> None:
    # Four captions, as of categories, that are known well: 75 images have a caption as good as any other of them.
    found = make_pairs(300, 3.0, repeats=75)
    assert found.candidates == 226
    assert found.recall_at_1 > 0.9
    assert not found.near_chance


def test_images_that_are_all_as_near_find_nothing() -> None:
    found = rank_pairs(torch.eye(300), torch.full((300, 300), 300**-0.5), torch.arange(300))
    assert (found.recall_at_10, found.median_rank) == (0, 300)


def test_a_single_image_tells_nothing() -> None:
    alike = torch.ones(300, 4) / 2
    assert rank_pairs(alike, alike, torch.arange(300)).near_chance


@pytest.mark.parametrize("num_images", [50, 20])
def test_ranks_are_counted_one_by_one(num_images: int) -> None:
    random = np.random.default_rng(0)
    captions = random.integers(0, 40, size=50)
    place = np.arange(50) % num_images  # an image of several captions is one, and none of another caption than these
    images, texts = (random.normal(size=(50, 8)).astype(np.float32) for _ in range(2))
    images = images[place]
    found = rank_pairs(*map(torch.from_numpy, (images, texts, captions)))
    cosines = texts @ images.T
    own = [set(place[captions == captions[i]]) for i in range(50)]
    others = [[j for j in range(num_images) if j not in own[i]] for i in range(50)]
    ranks = [1 + sum(cosines[i, j] >= cosines[i, i] for j in others[i]) for i in range(50)]
    assert found.median_rank == np.median(ranks)
    assert found.recall_at_10 == np.mean(np.array(ranks) <= 10)
    assert found.chance_at_10 == pytest.approx(np.mean([10 / (1 + len(each)) for each in others]))
    assert found.chance_rank == pytest.approx(1 + np.mean(list(map(len, others))) / 2)


def test_few_images_are_judged_by_the_first() -> None:
    nearer = np.array([0] * 4 + [5] * 46)
    few = summarise_ranks(nearer, np.full(50, 49))
    assert few.recall_at_10 == 1
    assert few.near_chance  # 8 %, and a guess 2 %
    assert not summarise_ranks(np.array([0] * 6 + [5] * 44), np.full(50, 49)).near_chance
