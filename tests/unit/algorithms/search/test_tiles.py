"""Tiles computed from their numbers, and their division among processes over several sessions."""

from __future__ import annotations

import random

import numpy as np
import pytest

from clipcid_cli.algorithms.search.tiles import PieceTiles, TriangleTiles, cut, deal, left_after


@pytest.mark.parametrize("num_panels", [0, 1, 2, 3, 8, 41])
def test_tiles_of_a_triangle_go_back_and_forth(num_panels: int) -> None:
    expected = [
        (i, j)
        for i in range(num_panels)
        for j in (range(i, num_panels) if i % 2 == 0 else range(num_panels - 1, i - 1, -1))
    ]
    assert list(TriangleTiles(num_panels)) == expected


def test_the_last_of_many_tiles_is_found_at_once() -> None:
    tiles = TriangleTiles(10**7)
    assert tiles.at(0) == (0, 0)
    assert tiles.at(10**7 - 1) == (0, 10**7 - 1)
    assert tiles.at(10**7) == (1, 10**7 - 1)
    assert tiles.at(len(tiles) - 1) == (10**7 - 1, 10**7 - 1)


def test_tiles_of_pieces() -> None:
    assert list(PieceTiles(np.array([2, 0, 1, 0]))) == [(0, 0), (0, 1), (2, 0)]
    assert list(PieceTiles(np.array([], np.int64))) == []


def test_every_number_is_done_once_however_often_processes_stop() -> None:
    generator = random.Random(0)
    for _ in range(200):
        total = generator.randrange(60)
        remaining, done = [range(total)], []
        while remaining:
            shares = deal(remaining, generator.choice([1, 2, 3, 8]))
            sizes = [sum(map(len, share)) for share in shares]
            assert max(sizes) - min(sizes) <= 1
            counts = [generator.randint(0, size) if generator.random() < 0.8 else size for size in sizes]
            for share, count in zip(shares, counts, strict=True):
                done += [number for part in cut(share, 0, count) for number in part]
            before, remaining = remaining, left_after(remaining, counts)
            assert sum(map(len, remaining)) == sum(map(len, before)) - sum(counts)
        assert sorted(done) == list(range(total))
