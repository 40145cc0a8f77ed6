"""The forest is single linkage by the textbook, under every way of cutting up the work."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from balance_data import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import DisjointSet

from clipcid_cli.algorithms import gather as gathering
from clipcid_cli.algorithms.near import edges as edges_module
from clipcid_cli.algorithms.near import search
from clipcid_cli.algorithms.near.block import Block, load_block
from clipcid_cli.algorithms.near.duplicates import collapse_duplicates, hash_rows
from clipcid_cli.algorithms.near.edges import Edges, merge_edges, sort_edges
from clipcid_cli.algorithms.near.exact import LONGEST_ROW, IntArray
from clipcid_cli.algorithms.near.search import near_pairs, search_jobs
from clipcid_cli.algorithms.sets import forest as forest_module
from clipcid_cli.algorithms.sets.components import connected_components
from clipcid_cli.algorithms.sets.forest import ForestSink, forest_curve

CPU = torch.device("cpu")
SCAN_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def all_edges(rows: np.ndarray) -> Edges:
    """Every pair with its weight, by the definition."""
    a, b = np.triu_indices(len(rows), 1)
    wide = rows.astype(np.float64)
    squared = ((wide[a] - wide[b]) ** 2).sum(axis=1)
    return Edges(a.astype(np.int64), b.astype(np.int64), np.sqrt(squared).astype(np.float32))


def kruskal(num_rows: int, edges: Edges) -> list[tuple[float, int, int]]:
    """The textbook algorithm, edge by edge."""
    sets = DisjointSet(range(num_rows))
    return [(weight, a, b) for weight, a, b in sorted(as_list(edges)) if sets.merge(a, b)]


def as_list(edges: Edges) -> list[tuple[float, int, int]]:
    return list(zip(edges.weight.tolist(), edges.a.tolist(), edges.b.tolist(), strict=True))


def cut(rows: np.ndarray, numbers: IntArray, dtype: torch.dtype, size: int) -> list[Block]:
    """Cut rows into panels."""
    return [load_block(rows.__getitem__, numbers[at : at + size], CPU, dtype) for at in range(0, len(numbers), size)]


def all_of_them(a: IntArray, b: IntArray, at_least: np.ndarray) -> np.ndarray:
    return np.ones(len(a), np.bool_)


def build(
    rows: np.ndarray,
    cutoff: float,
    dtype: torch.dtype,
    panel_rows: int,
    order_seed: int,
    processes: int,
) -> Edges:
    """Build the forest as a step does: copies collapsed, tiles dealt out, one forest a process, merged."""
    read = rows.__getitem__
    unique, stars = collapse_duplicates(read, np.arange(len(rows)), hash_rows(rows))
    panels = cut(rows, unique, dtype, panel_rows)
    tiles = [(a, b) for at, a in enumerate(panels) for b in panels[at:]]
    random.Random(order_seed).shuffle(tiles)
    forests = [stars]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest_module, "_MIN_FOLD", 64)
        for process in range(processes):
            builder = ForestSink(len(rows))
            for _, pieces in search_jobs(tiles[process::processes], lambda block: block, cutoff, builder.wants):
                for edges in pieces:
                    builder.add(edges)
            forests.append(builder.result())
    return ForestSink(len(rows), Edges.concatenate(forests)).result()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(2, 70),
    width=st.sampled_from([1, 3, 16, 33]),
    noise=st.sampled_from([0.0, 1e-3, 0.05, 0.3]),
    cutoff=st.sampled_from([0.0, 0.02, 0.3, 1.0, 1.5, 2.1]),
    dtype=st.sampled_from(SCAN_DTYPES),
    panel_rows=st.integers(1, 80),
    processes=st.integers(1, 3),
)
def test_forest_is_kruskals_whatever_the_tiling_order_format_and_number_of_processes(
    seed: int,
    num_rows: int,
    width: int,
    noise: float,
    cutoff: float,
    dtype: torch.dtype,
    panel_rows: int,
    processes: int,
) -> None:
    rows = make_rows(num_rows, width, seed, 5, noise)
    edges = all_edges(rows)
    expected = kruskal(num_rows, edges[edges.weight <= np.float32(cutoff)])
    assert as_list(build(rows, cutoff, dtype, panel_rows, seed, processes)) == expected


@settings(max_examples=40)
@given(st.data())
def test_minimum_forest_of_any_graph_with_many_ties(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(2, 30))
    pair = st.tuples(st.integers(0, num_rows - 1), st.integers(0, num_rows - 1)).filter(lambda ends: ends[0] < ends[1])
    pairs = data.draw(st.lists(st.tuples(pair, st.sampled_from([0.0, 0.25, 0.5])), max_size=80))
    a, b = np.array([ends for ends, _ in pairs], np.int64).reshape(-1, 2).T
    edges = Edges(a, b, np.array([weight for _, weight in pairs], np.float32))
    forest = ForestSink(num_rows, edges).result()
    assert as_list(forest) == kruskal(num_rows, edges)
    curve = forest_curve(num_rows, forest, data.draw(st.sampled_from([None, 0.0, 0.1, 0.6])))
    for distance, kept, largest in zip(curve.distance, curve.kept, curve.largest, strict=True):
        within = edges[edges.weight <= distance]
        _, sizes = np.unique(connected_components(num_rows, within.a, within.b), return_counts=True)
        assert (kept, largest) == (len(sizes), sizes.max())
    ascending = sort_edges(edges)
    assert as_list(ascending) == sorted(as_list(edges))
    cut = data.draw(st.integers(0, len(edges)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edges_module, "_MERGED_AT_ONCE", data.draw(st.integers(1, 9)))
        one, other = sort_edges(edges[:cut]), sort_edges(edges[cut:])
        merged, is_other = merge_edges(one, other)
    assert as_list(merged) == sorted(as_list(edges))
    assert (as_list(merged[~is_other]), as_list(merged[is_other])) == (as_list(one), as_list(other))
    sets = DisjointSet(range(num_rows))
    for ends, _ in pairs:
        sets.merge(*ends)
    labels = connected_components(num_rows, edges.a, edges.b)
    assert labels.tolist() == [min(sets.subset(row)) for row in range(num_rows)]


@settings(max_examples=20)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from([(16, 16), (16, 256), (16_384, 2**18)]),
    st.integers(0, 2**32 - 1),
)
def test_blocks_queued_as_on_a_gpu_have_the_same_pairs_crowded_or_not(
    m: int, n: int, is_diagonal: bool, queued: tuple[int, int], seed: int
) -> None:
    n = 0 if is_diagonal else n
    rows = make_rows(m + n, 16, seed, 40, 0.2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a = load_block(rows.__getitem__, np.arange(m), CPU, dtype)
        b = load_block(rows.__getitem__, np.arange(m, m + n), CPU, dtype) if n else a
        with pytest.MonkeyPatch.context() as patch:
            for name, most in zip(("_FEW_QUEUED", "_MANY_QUEUED"), queued, strict=True):
                patch.setattr(search, name, most)
            found = Edges.concatenate(search.queue(a, b, 0.1, all_of_them, search.Crowding()))
        near = [edge for edge in as_list(all_edges(rows)) if edge[0] <= np.float32(0.1)]
        assert sorted(as_list(found)) == sorted(edge for edge in near if is_diagonal or edge[1] < m <= edge[2])


@pytest.mark.parametrize("dtype", SCAN_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("others", "centres"),
    [(128, 1), (100, 1), (384, 1), (128, 300)],  # of 384, a piece ends inside a row of three stretches
)
def test_near_pairs_come_in_pieces_of_bounded_size(
    dtype: torch.dtype, others: int, centres: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also up to a distance beyond √2, where scores are negative: that of many centres."""
    monkeypatch.setattr(search, "_STRETCHES_AT_ONCE", 2)
    monkeypatch.setattr(search, "_MANY_PAIRS", 100)
    rows = make_rows(256 + others, 16, 5, centres, 0.05)
    expected = all_edges(rows)
    one, other = cut(rows, np.arange(256), dtype, 256) + cut(rows, np.arange(256, len(rows)), dtype, others)
    for pair, is_asked in (
        ((one, one), expected.b < 256),
        ((one, other), (expected.a < 256) & (expected.b >= 256)),
    ):
        cutoff = float(np.quantile(expected.weight, 0.8))
        pieces = list(near_pairs(*pair, cutoff, all_of_them))
        assert max(map(len, pieces)) <= 100 + 256
        near = expected[is_asked & (expected.weight <= np.float32(cutoff))]
        assert set(as_list(Edges.concatenate(pieces))) == set(as_list(near))
        assert sum(map(len, pieces)) == len(near)


def test_rows_that_would_be_inexact_are_refused() -> None:
    rows = np.full((2, 16), LONGEST_ROW, np.float16)
    with pytest.raises(ValueError, match=r"finite and no longer than 2\.0, not 8"):
        load_block(rows.__getitem__, np.arange(2), CPU, torch.float32)
    rows[:] = np.nan
    with pytest.raises(ValueError, match="finite"):
        load_block(rows.__getitem__, np.arange(2), CPU, torch.float32)


def test_copies_are_found_though_hashes_collide() -> None:
    rows = np.array([[1, 0], [0, 1], [1, 0], [0, -1], [0, 1], [-0.0, 1], [1, 0]], np.float16)
    unique, edges = collapse_duplicates(rows.__getitem__, np.arange(7), np.zeros(7, np.uint64))
    assert unique.tolist() == [0, 1, 3]
    assert sorted(as_list(edges)) == [(0.0, 0, 2), (0.0, 0, 6), (0.0, 1, 4), (0.0, 1, 5)]
    again, same = collapse_duplicates(rows.__getitem__, np.arange(7), hash_rows(rows))
    assert again.tolist() == [0, 1, 3]
    assert sorted(as_list(same)) == sorted(as_list(edges))


def test_few_edges_of_many_rows_wait_until_a_merge_is_worth_a_pass_over_all_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged = list[int]()
    contract = forest_module._contract

    def watched(num_rows: int, edges: Edges) -> object:
        merged.append(len(edges))
        return contract(num_rows, edges)

    monkeypatch.setattr(forest_module, "_MIN_FOLD", 1)
    monkeypatch.setattr(forest_module, "_contract", watched)
    sink = ForestSink(64_000)
    for row in range(0, 2_000, 2):
        sink.add(Edges(np.array([row]), np.array([row + 1]), np.ones(1, np.float32)))
    assert merged == []
    monkeypatch.setattr(np, "unique", None)  # to sort what is picked would take most of a merge
    assert len(sink.result()) == 1_000


@pytest.mark.parametrize("threads", [1, 3])
def test_values_are_gathered_by_all_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_PLACES_OF_THREAD", 7)
    taken = set[int]()

    class Watched(np.ndarray):
        def take(self, *given: Any, **more: Any) -> Any:
            taken.add(threading.get_ident())
            time.sleep(0.001)  # so that one thread does not take all
            return super().take(*given, **more)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = np.arange(100)[::-1].copy()
        places = np.random.default_rng(0).integers(0, 100, 60).astype(np.int32)
        assert np.array_equal(gathering.gather(values.view(Watched), places), values[places])
    finally:
        torch.set_num_threads(before)
    assert len(taken) == threads
