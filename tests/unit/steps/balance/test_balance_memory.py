"""What `balance` holds a row, of which 400 million must fit into memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from balance_data import balance, make_rows, write_embeddings

from clipcid_cli.formats import arrays, parquet

FEW, MANY = 20_000, 60_000


def peak_of_balance(folder: Path, num_rows: int) -> int:
    """The most bytes that Python and numpy hold at a time, with all that is dropped before repeats."""
    texts, near = make_rows(num_rows, 8, seed=1), str(write_embeddings(folder / "r", make_rows(500, 8, seed=2)))
    embeddings = write_embeddings(folder / "e", make_rows(num_rows, 8), texts=texts, captions=["x"] * num_rows)
    filters = {"against": (near, near), "against_threshold": 0.3, "min_caption_similarity": -0.5}
    tracemalloc.start()
    try:
        balance(folder / "w", embeddings, threshold=0.05, precision="fp32", **filters)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_first_process_holds_at_most_128_bytes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of larger data these are buffers of fixed size.
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 2**11)
    monkeypatch.setattr(arrays, "_STRINGS_AT_ONCE", 2**11)
    # Drawings have as many points for any number of rows, and are freed when it pleases Python.
    for drawing in ("report", "filters.captions"):
        monkeypatch.setattr(f"clipcid_cli.steps.balance.{drawing}.svg", lambda figure, title: "")
    # What the first run imports is traced, too.
    _, few, many = (peak_of_balance(tmp_path / str(number), number) for number in (1000, FEW, MANY))
    assert 0 < (many - few) / (MANY - FEW) <= 128
