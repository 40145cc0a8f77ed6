"""The forest that is there: reused by other amounts, extended where it is too short, grown where files were added."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from balance_data import balance, make_rows, read_keep, write_embeddings

from clipcid_cli.algorithms.near import plan as planning
from clipcid_cli.errors import ClipcidError

FILES = ("keep.parquet", "forest.parquet", "curve.csv", "sets.parquet")


def write_shards(folder: Path, rows: np.ndarray, shards: dict[int, range]) -> Path:
    """Write numbered files of some rows, named by their numbers among all rows."""
    for number, part in shards.items():
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / "img_emb" / f"img_emb_{number:04d}.npy", rows[part.start : part.stop])
        keys = pd.DataFrame({"key": [f"{row:06d}" for row in part]})
        keys.to_parquet(folder / "metadata" / f"metadata_{number:04d}.parquet")
    return folder


@pytest.fixture
def rows() -> np.ndarray:
    found = make_rows(900, width=16)
    found[400] = found[700]  # the first of its kind is new where rows 300 … 599 are added
    found[10] = np.nan
    return found


def read_outputs(work: Path) -> dict[str, bytes]:
    return {name: (work / "balance" / name).read_bytes() for name in FILES}


def test_another_keep_ratio_reuses_the_forest_and_a_smaller_one_extends_it(tmp_path: Path) -> None:
    folder, work = write_embeddings(tmp_path / "e", make_rows(300)), tmp_path / "work"
    sizes = []
    for keep, is_there in ((0.6, False), (0.7, True), (0.05, False)):
        result, said = balance(work, folder, keep=keep)
        assert ("forest of these embeddings exists" in said) == is_there
        sizes.append(len((work / "balance" / "forest.parquet").read_bytes()))
        balance(tmp_path / str(keep), folder, keep=keep)
        assert (work / "balance" / "keep.parquet").read_bytes() == read_outputs(tmp_path / str(keep))["keep.parquet"]
    assert sizes[0] == sizes[1] < sizes[2]
    again, said = balance(work, folder, keep=0.05)
    assert "already holds this result" in said
    assert again == result
    _, told = balance(work, folder, keep=0.05, keys="shard")
    assert "The forest of these embeddings exists" in told
    assert read_keep(work)["key"][0] == "img_emb_0/000000"

    other = write_embeddings(tmp_path / "other", make_rows(300)[::-1].copy())
    with pytest.raises(ClipcidError, match="made with other settings or inputs") as refused:
        balance(work, other, keep=0.5)
    assert "--overwrite" in refused.value.fix
    balance(work, other, keep=0.5, overwrite=True)
    balance(tmp_path / "fresh", other, keep=0.5)
    assert read_outputs(work) == read_outputs(tmp_path / "fresh")


def test_a_dry_run_states_pairs_memory_and_time(tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", make_rows(300))
    result, said = balance(tmp_path / "w", folder, keep=0.5, dry_run=True)
    assert (result["images"], result["pairs"]) == (300, 300 * 299 // 2)
    assert "exact: 44,850 pairs" in said
    assert {**result["exact"], "neighbors": "exact"}.items() <= result.items()
    assert (result["flop"], result["memory"]["mapped"]) == (2 * 32 * result["pairs"], 300 * 32 * 2)
    assert result["memory"]["resident"] > 0 < result["disk"]
    parts, _ = balance(tmp_path / "w", folder, threshold=0.5, neighbors="partitioned", dry_run=True)
    assert {**parts["partitioned"], "neighbors": "partitioned"}.items() <= parts.items()
    for cost in (parts["exact"], parts["partitioned"]):
        assert cost["pairs"] > 0
        assert 0.0 < cost["seconds"] < 60.0
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("added", "linkage"), [((3,), "single"), ((2,), "single"), ((1, 3), "star"), ((1, 2, 3), "single")], ids=str
)
def test_added_files_alone_are_compared_and_the_bytes_are_those_of_a_search_from_nothing(
    tmp_path: Path, rows: np.ndarray, added: tuple[int, ...], linkage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_MAX_PANEL", "_MIN_PANEL"):
        monkeypatch.setattr(planning, name, 64)
    call = {"threshold": 0.5, "linkage": linkage}
    shards = {1: range(250), 2: range(250, 600), 3: range(600, 850), 4: range(850, 900)}
    whole = write_shards(tmp_path / "whole", rows, shards)
    part = write_shards(tmp_path / "part", rows, {each: shards[each] for each in shards if each not in added})
    balance(tmp_path / "work", part, **call)
    write_shards(part, rows, shards)
    _, told = balance(tmp_path / "work", part, **call)
    old = sum(len(shards[each]) - (each == 1) for each in shards if each not in added)
    assert f"A forest of {old:,} of the 899 images exists: only the others are compared." in told
    balance(tmp_path / "new", whole, **call)
    assert read_outputs(tmp_path / "work") == read_outputs(tmp_path / "new")
    # What was merged is a forest like any other.
    _, told = balance(tmp_path / "work", part, threshold=0.45)
    assert "The forest of these embeddings exists" in told


def test_changed_and_removed_files_are_named_and_nothing_of_theirs_is_used(tmp_path: Path, rows: np.ndarray) -> None:
    shards = {1: range(300), 2: range(300, 600), 3: range(600, 900)}
    folder = write_shards(tmp_path / "e", rows, shards)
    balance(tmp_path / "work", folder, threshold=0.5)
    shutil.move(folder / "img_emb" / "img_emb_0002.npy", tmp_path)
    shutil.move(folder / "metadata" / "metadata_0002.parquet", tmp_path)
    with pytest.raises(ClipcidError, match=r"6 files there, 4 now; changed or gone: img_emb_0002\.npy, metadata_0002"):
        balance(tmp_path / "work", folder, threshold=0.5)
    _, told = balance(tmp_path / "work", folder, threshold=0.5, overwrite=True)
    assert "(3 files there, 2 now; changed or gone: img_emb_0002.npy)" in told
    balance(tmp_path / "new", folder, threshold=0.5)
    assert read_outputs(tmp_path / "work") == read_outputs(tmp_path / "new")
    # Shards in another order.
    other = write_shards(tmp_path / "e", rows, {1: shards[3], 3: shards[1], 4: shards[2]})
    _, told = balance(tmp_path / "work", other, threshold=0.5, overwrite=True)
    assert "unchanged and in that order (2 files there, 3 now): all pairs are compared" in told
    # A larger cut-off than the forest was searched to.
    write_shards(folder, rows, {5: range(10)})
    _, told = balance(tmp_path / "work", folder, threshold=0.6, keys="shard")
    assert "The existing forest ends at distance 0.5000: all pairs are compared." in told
