"""The table of sets, and the sets that the report lists because single linkage chained them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from balance_data import balance, distance_matrix, make_rows, read_keep, write_embeddings

from clipcid_cli.steps.balance import report

NUM_ROWS = 500


def make_chains() -> np.ndarray:
    """Rows of which two groups are chains: steps of 0.1 along an arc, the first with copies in it."""
    rows = make_rows(NUM_ROWS)
    for start, number in ((50, 40), (200, 25)):
        angle = 0.1 * np.arange(number)
        arc = np.zeros((number, rows.shape[1]))
        arc[:, 2 * (start > 100)], arc[:, 2 * (start > 100) + 1] = np.cos(angle), np.sin(angle)
        rows[start : start + number] = arc
    rows[460:463] = rows[55]
    return rows


@pytest.mark.parametrize("linkage", ["single", "star"])
def test_every_set_has_its_diameter_and_its_farthest_image(tmp_path: Path, linkage: str) -> None:
    rows = make_chains()
    folder = write_embeddings(tmp_path / "e", rows)
    result, _ = balance(tmp_path / "w", folder, threshold=0.2, linkage=linkage)
    keep, table = read_keep(tmp_path / "w"), pd.read_parquet(result["files"]["sets"])
    sizes = keep.groupby("component").size()
    assert table["component"].tolist() == sizes.index[sizes > 1].tolist()
    assert table["size"].tolist() == sizes[sizes > 1].tolist()
    assert table["diameter_is_exact"].all()
    matrix = distance_matrix(rows)
    for each in table.itertuples():
        members = np.flatnonzero(keep["component"] == each.component)
        assert each.diameter == matrix[np.ix_(members, members)].max()
        kept = int(each.representative)
        assert keep["kept"][kept]
        distances = matrix[kept, members]
        assert (each.farthest_distance, int(each.farthest)) == (distances.max(), members[distances.argmax()])
    page = (tmp_path / "w" / "balance" / "report.html").read_text()
    assert ("Where single linkage chained most" in page) == (linkage == "single")


def test_the_report_lists_chains_and_what_stars_keep_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    find = report.find_chains

    def listen(*given: object) -> list[dict[str, Any]]:
        seen.append(find(*given))
        return seen[-1]

    monkeypatch.setattr("clipcid_cli.steps.balance.report.find_chains", listen)
    rows = make_chains()
    folder = write_embeddings(tmp_path / "e", rows)
    balance(tmp_path / "single", folder, threshold=0.2)
    balance(tmp_path / "star", folder, threshold=0.2, linkage="star")
    (found, none) = seen
    assert none == []
    keep, stars = read_keep(tmp_path / "single"), read_keep(tmp_path / "star")
    beyond = keep[keep["distance"] > np.float32(0.2)].groupby("component").size().sort_values(ascending=False)
    assert {50, 200} <= {chain["label"] for chain in found[:2]} == set(beyond.index[:2])
    assert [chain["beyond"] for chain in found] == beyond.tolist()[: len(found)]
    for chain in found:
        inside = keep["component"] == chain["label"]
        kept = np.flatnonzero(inside & stars["kept"])
        assert len(chain["stars"]) == len(kept)
        assert set(chain["stars"]) <= set(kept)
        represented = stars[inside].groupby("representative").size()
        numbers = [represented[f"{row:06d}"] for row in chain["stars"]]
        assert numbers == sorted(represented, reverse=True)[: len(numbers)]
    monkeypatch.setattr(report, "_MAX_STARRED", 10)
    balance(tmp_path / "few", folder, threshold=0.2)
    assert seen[-1][0]["stars"] is None
    assert "is not computed for so large a group" in (tmp_path / "few" / "balance" / "report.html").read_text()
