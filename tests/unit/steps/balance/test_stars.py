"""`balance --linkage star`: tight sets, and the same ones whichever way their pairs are had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from balance_data import balance, check_keep_list, distance_matrix, make_rows, read_keep, write_embeddings

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.balance import sets

NUM_ROWS = 300


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def embeddings(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only folder of embeddings."""
    return write_embeddings(tmp_path_factory.mktemp("embeddings") / "foreign", rows)


def test_star_sets_are_tight(embeddings: Path, rows: np.ndarray, tmp_path: Path) -> None:
    by_ratio, _ = balance(tmp_path, embeddings, keep=0.3, linkage="star")
    assert 0.27 * NUM_ROWS <= by_ratio["kept"] <= 0.3 * NUM_ROWS
    again, said = balance(tmp_path, embeddings, threshold=by_ratio["threshold"], linkage="star")
    assert "forest of these embeddings exists" in said
    assert (again["kept"], again["uncovered_ratio"]) == (by_ratio["kept"], 0.0)
    keep = read_keep(tmp_path)
    check_keep_list(keep, rows)
    assert (keep["distance"] <= np.float32(again["threshold"])).all()
    kept = np.flatnonzero(keep["kept"])
    between = distance_matrix(rows[kept])[np.triu_indices(len(kept), 1)]
    assert (between > np.float32(again["threshold"])).all()
    curve = pd.read_csv(tmp_path / "balance" / "curve.csv")
    assert curve[np.isclose(curve["distance"], again["threshold"], atol=1e-7)]["kept"].tolist() == [again["kept"]]


@pytest.mark.parametrize("keep", [0.85, 0.5, 0.1])
def test_stars_are_the_same_however_far_the_forest_reaches(keep: float, embeddings: Path, tmp_path: Path) -> None:
    def bytes_of(work: Path, forest_first: bool = False) -> list[bytes]:
        if forest_first:
            balance(work, embeddings, keep=keep)
        balance(work, embeddings, keep=keep, linkage="star")
        return [(work / "balance" / name).read_bytes() for name in ("keep.parquet", "curve.csv")]

    assert bytes_of(tmp_path / "fresh") == bytes_of(tmp_path / "rerun", forest_first=True)


def test_stars_begin_at_the_threshold_of_single_linkage(tmp_path: Path) -> None:
    """Pairs at distances that differ, far from each other: both linkages drop the same images."""
    angles = np.concatenate([np.zeros(20), np.linspace(0.1, 0.2, 20)])
    rows = np.zeros((40, 40), np.float32)
    for number, angle in enumerate(angles):
        rows[number, [number % 20, number % 20 + 20]] = np.cos(angle), np.sin(angle)
    folder = write_embeddings(tmp_path / "pairs", rows.astype(np.float16))
    for kept in (38, 33, 21):
        for linkage in ("single", "star"):
            result, _ = balance(tmp_path, folder, keep=kept / 40, linkage=linkage)
            assert result["kept"] == kept, linkage


def test_stars_of_partitions_do_not_depend_on_what_was_there(embeddings: Path, tmp_path: Path) -> None:
    for name, linkages in (("fresh", ["star"]), ("after", ["single", "star"])):
        for linkage in linkages:
            balance(tmp_path / name, embeddings, threshold=0.3, linkage=linkage, neighbors="partitioned")
    fresh, after = ((tmp_path / name / "balance" / "keep.parquet").read_bytes() for name in ("fresh", "after"))
    assert fresh == after


def test_more_pairs_than_fit_are_an_error(embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "_MAX_COLLECTED", 50)
    with pytest.raises(ClipcidError, match=r"More than 50 pairs of images are within 0\.6000 .*75 bytes each"):
        balance(tmp_path, embeddings, threshold=0.6, linkage="star")


def test_star_with_more_copies_than_should_go(tmp_path: Path) -> None:
    rows = make_rows(20, num_centroids=20)[np.arange(60) % 20]
    result, _ = balance(tmp_path, write_embeddings(tmp_path / "copies", rows), keep=0.8, linkage="star")
    assert (result["kept"], result["threshold"]) == (len(np.unique(rows, axis=0)), 0.0)
    check_keep_list(read_keep(tmp_path), rows)
