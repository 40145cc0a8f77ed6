"""What a search keeps of the pairs it collector."""

from __future__ import annotations

import numpy as np

from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.sets.collector import PairCollector
from clipcid_cli.algorithms.sets.forest import minimum_forest


def some_edges(seed: int, number: int) -> Edges:
    generator = np.random.default_rng(seed)
    a, b = generator.integers(0, 40, size=(2, number))
    apart = a != b
    return Edges(np.minimum(a, b)[apart], np.maximum(a, b)[apart], ((a * 7 + b * 7) % 13)[apart].astype(np.float32))


def same(one: Edges, other: Edges) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("a", "b", "weight"))


def test_all_pairs_and_their_forest() -> None:
    collector = PairCollector(40, Edges.empty(), 10_000)
    parts = [some_edges(seed, 50) for seed in range(6)]
    for part in parts:
        assert collector.may_matter(part.a, part.b, part.weight).all()
        collector.add(part)
        assert collector.pairs() is not None
    everything = Edges.concatenate(parts)
    found = collector.pairs()
    assert found is not None
    assert same(found, sort_edges(everything))
    assert same(collector.forest(), minimum_forest(40, everything))


def test_too_many_pairs_leave_the_forest() -> None:
    collector = PairCollector(40, Edges.empty(), 70)
    parts = [some_edges(seed, 50) for seed in range(6)]
    for part in parts:
        collector.add(part)
    assert collector.pairs() is None
    forest = collector.forest()
    assert same(forest, minimum_forest(40, Edges.concatenate(parts)))
    known = PairCollector(40, forest, 0)
    assert same(known.forest(), forest)
    assert not known.may_matter(forest.a[-1:], forest.b[-1:], np.full(1, np.inf, np.float32)).any()


def test_pairs_can_be_forgotten() -> None:
    collector = PairCollector(40, Edges.empty(), 100)
    collector.add(some_edges(0, 20))
    collector.forget_pairs()
    collector.add(some_edges(1, 20))
    assert collector.pairs() is None
    assert PairCollector(40, Edges.empty(), 5).pairs() is not None
