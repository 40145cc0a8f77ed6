"""A long proof of the search: ten million pairs at the cut-off."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipcid_cli.algorithms.near.block import Block, load_block
from clipcid_cli.algorithms.near.exact import IntArray
from clipcid_cli.algorithms.near.search import near_pairs_of

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def exact_distances(rows: np.ndarray) -> np.ndarray:
    """Every distance by the definition, float32 [N, N]: exact in float64, whatever the order of its sums."""
    wide = rows.astype(np.float64)
    squared = (wide * wide).sum(axis=1)
    return np.sqrt(np.maximum(0.0, squared[:, None] + squared - 2.0 * wide @ wide.T)).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def tiles(rows: np.ndarray, dtype: torch.dtype) -> list[tuple[Block, Block]]:
    """All pairs of three panels."""
    panels = [load_block(rows.__getitem__, part, CPU, dtype) for part in np.array_split(np.arange(len(rows)), 3)]
    return [(a, b) for at, a in enumerate(panels) for b in panels[at:]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_ten_million_pairs_at_the_cutoff_are_decided_as_in_float64(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    # So alike that every score lies within bfloat16's error of the cut-off's.
    rows = unit(generator.normal(size=512) + 0.2 * generator.normal(size=(4_600, 512)))
    exact = exact_distances(rows)
    a, b = np.triu_indices(len(rows), 1)
    cutoff = float(np.median(exact[a, b]))
    scores = 1.0 - exact[a, b].astype(np.float64) ** 2 / 2.0
    assert len(a) > 10_000_000
    assert np.mean(np.abs(scores - (1.0 - cutoff**2 / 2.0)) < 0.0078) > 0.9
    found = np.zeros(exact.shape, np.bool_)

    def all_of_them(rows_a: IntArray, rows_b: IntArray, at_least: np.ndarray) -> np.ndarray:
        assert (at_least <= exact[rows_a, rows_b]).all()
        return np.ones(len(rows_a), np.bool_)

    for pieces in near_pairs_of(tiles(rows, dtype), cutoff, all_of_them):
        for edges in pieces:
            assert not found[edges.a, edges.b].any(), "no pair is found twice"
            found[edges.a, edges.b] = True
            np.testing.assert_array_equal(edges.weight, exact[edges.a, edges.b])
    assert np.count_nonzero(found[a, b] != (exact[a, b] <= np.float32(cutoff))) == 0
    assert np.count_nonzero(np.tril(found)) == 0
