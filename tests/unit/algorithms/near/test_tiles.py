"""Tiles computed from their numbers, and their division among processes over several sessions."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.near.tiles import PieceTiles, TiledSearch, TriangleTiles, cut, deal, left_after


@pytest.mark.parametrize("num_panels", [0, 1, 2, 3, 8, 9, 40, 41, 64])
def test_tiles_of_a_triangle_are_each_there_once(num_panels: int) -> None:
    tiles = TriangleTiles(num_panels)
    found = list(tiles)
    assert len(tiles) == len(found)
    assert sorted(found) == [(i, j) for i in range(num_panels) for j in range(i, num_panels)]


def test_the_tiles_of_many_panels_are_found_at_once() -> None:
    tiles = TriangleTiles(10**7)
    assert tiles.at(0) == (0, 0)
    places = [len(tiles) * part // 1000 for part in range(1000)]
    found = [tiles.at(number) for number in (*places, len(tiles) - 1)]
    assert len(set(found)) == 1001
    assert all(0 <= i <= j < 10**7 for i, j in found)


def count_reads(numbers: range, tiles: TriangleTiles, room: int) -> int:
    """Count the panels that are read for some tiles, one after another, where the `room` that were used last are kept."""
    kept: OrderedDict[int, None] = OrderedDict()
    reads = 0
    for number in numbers:
        for panel in tiles.at(number):
            reads += panel not in kept
            kept[panel] = None
            kept.move_to_end(panel)
            while len(kept) > room:
                kept.popitem(last=False)
    return reads


# Panels, processes, panels that each has memory for; the most that one of them reads, as counted with this code. In rows of
# the triangle, every process each size-th tile, they were 200, 876, 2,266 and 3,380.
READS = [(200, 8, 200, 128), (200, 8, 100, 136), (200, 8, 20, 571), (100, 1, 20, 958)]


@pytest.mark.parametrize(("num_panels", "size", "room", "most"), READS)
def test_a_process_reads_few_panels_again(num_panels: int, size: int, room: int, most: int) -> None:
    tiles = TriangleTiles(num_panels)
    counts = [count_reads(numbers, tiles, room) for (numbers,) in deal([range(len(tiles))], size)]
    assert max(counts) <= most
    if room == num_panels:
        # None twice: a process whose panels fit into its memory reads its own, and the half of the others that follow.
        assert most <= num_panels * (1 / 2 + 1 / size) + 4


@pytest.mark.parametrize("room", [3, 10, 40])
def test_a_search_reads_what_was_counted(room: int) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, size=(320, 4)).astype(np.float16)
    reads: list[int] = []

    def read(rows: np.ndarray) -> np.ndarray:
        reads.append(int(rows[0]))
        return values[rows]

    stored_and_cast = 8 * 4 * (2 + 4)
    device = torch.device("cpu")
    search = TiledSearch(read, np.arange(320), device, torch.float32, panel_rows=8, cache_bytes=room * stored_and_cast)
    tiles = search.tiles()
    (share,) = deal([range(len(tiles))], 8)[3]
    for _, found in search.search_tiles(map(tiles.at, share), 0.01, lambda a, b, weight: np.ones(len(a), np.bool_)):
        list(found)
    assert len(reads) == count_reads(share, tiles, room)
    assert (len(set(reads)) == len(reads)) == (room == 40)


def test_every_share_of_a_triangle_has_a_part_of_its_diagonal() -> None:
    tiles = TriangleTiles(203)
    for numbers in deal([range(len(tiles))], 8):
        (share,) = numbers
        assert 12 < sum(i == j for i, j in map(tiles.at, share)) < 38  # 25 on average


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
