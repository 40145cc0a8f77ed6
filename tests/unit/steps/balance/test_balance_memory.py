"""What `balance` holds a row, of which 400 million must fit into memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from balance_data import balance, make_rows, write_embeddings

from clipcid_cli.algorithms.metrics.intervals import clopper_pearson
from clipcid_cli.algorithms.near.edges import Edges
from clipcid_cli.algorithms.sets import forest
from clipcid_cli.algorithms.sets.forest import ForestSink
from clipcid_cli.formats import arrays, parquet

FEW, MANY = 20_000, 60_000


def peak_of_balance(folder: Path, num_rows: int, texts: bool = False, **settings: Any) -> int:
    """The most bytes that Python and numpy hold at a time."""
    rows = make_rows(num_rows, 8)
    captions = {"texts": make_rows(num_rows, 8, seed=1), "captions": ["x"] * num_rows} if texts else {}
    embeddings = write_embeddings(folder / "e", rows, **captions)
    tracemalloc.start()
    try:
        balance(folder / "w", embeddings, threshold=0.05, precision="fp32", **settings)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("neighbors", ["exact", "partitioned"])
def test_the_first_process_holds_at_most_128_bytes_a_row(
    tmp_path: Path, neighbors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call: dict[str, Any] = {"neighbors": neighbors}
    # Of larger data these are buffers of fixed size.
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 2**11)
    monkeypatch.setattr(arrays, "_STRINGS_AT_ONCE", 2**11)
    for drawing in (
        "report",
        "filters.captions",
    ):  # of as many points for any number of rows, freed when it pleases Python
        monkeypatch.setattr(f"clipcid_cli.steps.balance.{drawing}.svg", lambda figure, title: "")
    if neighbors == "exact":  # with all that is dropped first, which holds more
        near = str(write_embeddings(tmp_path / "r", make_rows(500, 8, seed=2)))
        call |= {"against": (near, near), "against_threshold": 0.3, "min_caption_similarity": -0.5, "texts": True}
    # What the first run imports is traced, too; the audit of few rows needs no interval, and so no SciPy.
    clopper_pearson(1, 2)
    _, few, many = (peak_of_balance(tmp_path / str(number), number, **call) for number in (1000, FEW, MANY))
    assert 0 < (many - few) / (MANY - FEW) <= 128


def test_a_forest_is_built_in_64_bytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forest, "_MIN_FOLD", 2**10)

    def peak(num_rows: int) -> int:
        random = np.random.default_rng(0)
        tracemalloc.start()
        try:
            builder = ForestSink(num_rows)
            for _ in range(200):
                a = random.integers(num_rows - 1, size=num_rows // 40)
                b = a + 1 + random.integers(num_rows - 1 - a)
                builder.add(Edges(a, b, random.random(len(a), np.float32)))
            assert len(builder.result()) > 0.9 * num_rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Of all rows: the forest up to a cut-off has fewer edges.
    assert (peak(MANY) - peak(FEW)) / (MANY - FEW) <= 64
