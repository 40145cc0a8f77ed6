"""`balance --neighbors partitioned`, run in this process: true edges, few missing, an audit that says how few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import balance_data
import numpy as np
import pandas as pd
import pytest
from balance_data import begun, check_keep_list, distance_matrix, make_rows, read_keep, write_embeddings

from clipcid_cli.algorithms.near import plan as planning
from clipcid_cli.steps.balance import forest

NUM_ROWS = 3000
CUTOFF = 0.6


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS, width=64)


@pytest.fixture(scope="module")
def embeddings(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder of embeddings."""
    return write_embeddings(tmp_path_factory.mktemp("embeddings") / "foreign", rows)


def balance(work: Path, embeddings: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    return balance_data.balance(work, embeddings, **{"neighbors": "partitioned"} | settings)


def read_forest(work: Path, name: str = "forest-partitioned") -> pd.DataFrame:
    return pd.read_parquet(work / "balance" / f"{name}.parquet")


def test_edges_are_true_and_few_are_missing(rows: np.ndarray, embeddings: Path, tmp_path: Path) -> None:
    result, said = balance(tmp_path / "parts", embeddings, threshold=CUTOFF)
    exact, _ = balance(tmp_path / "exact", embeddings, threshold=CUTOFF, neighbors="exact")
    assert "partitions; rows within" in said
    assert ".grouped" not in Path("/proc/self/maps").read_text(), "a map of a removed file keeps its space on the disk"
    found, true = read_forest(tmp_path / "parts"), read_forest(tmp_path / "exact", "forest")
    distances = distance_matrix(rows)
    np.testing.assert_array_equal(found["distance"], distances[found["a"], found["b"]])
    assert (found["a"] < found["b"]).all()
    assert len(true) > 1000
    assert 0.998 * len(true) <= len(found) <= len(true)
    keep = read_keep(tmp_path / "parts")
    check_keep_list(keep, rows)
    assert result["kept"] == NUM_ROWS - len(found) >= exact["kept"]
    assert (exact["audit"], exact["neighbors"], result["neighbors"]) == (None, "exact", "partitioned")


def test_an_audit_counts_what_is_left(
    rows: np.ndarray, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows taken for kept: nearly all of them have another within the cut-off."""
    unique = np.unique(rows, axis=0)
    folder = write_embeddings(tmp_path / "unique", unique)
    monkeypatch.setattr(planning, "_PANEL", 700)
    near = distance_matrix(unique) <= np.float32(CUTOFF)
    np.fill_diagonal(near, False)
    kept = np.arange(0, len(unique), 2)
    expected = near[np.ix_(kept, kept)].any(axis=1)
    with begun(tmp_path, folder, threshold=CUTOFF) as run:
        whole = forest.audit_kept(run, kept, CUTOFF)
        assert 100 < whole.near == np.count_nonzero(expected) < len(kept)
        monkeypatch.setattr(forest, "AUDIT_SAMPLE", 900)
        part = forest.audit_kept(run, kept, CUTOFF)
    assert (part.sampled, part.kept) == (900, len(kept))
    assert part.low < whole.rate < part.high
    assert part.low < part.rate < part.high
    sample = np.random.default_rng(0).permutation(kept)[:900]
    assert part.near == np.count_nonzero(expected[np.searchsorted(kept, sample)])
