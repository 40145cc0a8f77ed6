"""What `balance` holds a row, of which 400 million must fit into memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from balance_data import balance, make_rows, write_embeddings

from clipcid_cli.algorithms.search.edges import Edges
from clipcid_cli.algorithms.sets.forest import ForestBuilder

FEW, MANY = 20_000, 60_000


def peak_of_balance(folder: Path, num_rows: int, neighbors: str) -> int:
    """The most bytes that Python and numpy hold at a time."""
    embeddings = write_embeddings(folder / "e", make_rows(num_rows, 8))
    tracemalloc.start()
    try:
        balance(folder / "w", embeddings, threshold=0.05, neighbors=neighbors, precision="fp32")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("neighbors", ["exact", "partitioned"])
def test_the_first_process_holds_at_most_128_bytes_a_row(tmp_path: Path, neighbors: str) -> None:
    few, many = (peak_of_balance(tmp_path / str(number), number, neighbors) for number in (FEW, MANY))
    assert (many - few) / (MANY - FEW) <= 128


def test_a_forest_is_built_in_64_bytes_a_row() -> None:
    def peak(num_rows: int) -> int:
        random = np.random.default_rng(0)
        tracemalloc.start()
        try:
            builder = ForestBuilder(num_rows, smallest_fold=2**10)
            for _ in range(200):
                a = random.integers(num_rows - 1, size=num_rows // 40)
                b = a + 1 + random.integers(num_rows - 1 - a)
                builder.add(Edges(a, b, random.random(len(a), np.float32)))
            assert len(builder.build()) > 0.9 * num_rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Of all rows: the forest up to a cut-off has fewer edges.
    assert (peak(MANY) - peak(FEW)) / (MANY - FEW) <= 64
