"""Files were added: only their rows are compared, and the result has the bytes of a search from nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from balance_data import balance, make_rows, read_keep
from sidecars import edit_sidecar

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


@pytest.mark.parametrize("added", [(3,), (2,), (1, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("call", [{"threshold": 0.5}, {"threshold": 0.5, "linkage": "star"}], ids=str)
def test_the_bytes_are_those_of_a_search_from_nothing(
    tmp_path: Path, rows: np.ndarray, added: tuple[int, ...], call: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_MAX_PANEL", "_MIN_PANEL"):
        monkeypatch.setattr(planning, name, 64)
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


@pytest.mark.parametrize("call", [{"keep": 1.0}, {"threshold": 0.0}], ids=str)
def test_a_result_that_needs_no_search_leaves_the_forest_of_fewer_files(
    tmp_path: Path, rows: np.ndarray, call: dict
) -> None:
    shards = {1: range(500), 2: range(500, 900)}
    part = write_shards(tmp_path / "part", rows, {1: shards[1]})
    balance(tmp_path / "work", part, threshold=0.5)
    write_shards(part, rows, shards)
    balance(tmp_path / "work", part, **call)
    _, told = balance(tmp_path / "work", part, threshold=0.5)
    assert "only the others are compared" in told


@pytest.mark.parametrize(("keep", "later"), [(0.6, 0.6), (0.6, 0.9), (0.9, 0.2)])
def test_a_share_to_keep_gives_the_same_list_however_far_the_forest_reaches(
    tmp_path: Path, rows: np.ndarray, keep: float, later: float
) -> None:
    shards = {1: range(500), 2: range(500, 900)}
    part = write_shards(tmp_path / "part", rows, {1: shards[1]})
    balance(tmp_path / "work", part, keep=keep)
    write_shards(part, rows, shards)
    found, told = balance(tmp_path / "work", part, keep=later)
    assert "only the others are compared" in told
    expected, _ = balance(tmp_path / "new", part, keep=later)
    pd.testing.assert_frame_equal(read_keep(tmp_path / "work"), read_keep(tmp_path / "new"))
    assert (found["kept"], found["threshold"]) == (expected["kept"], expected["threshold"])
    forests = [pd.read_parquet(tmp_path / work / "balance" / "forest.parquet") for work in ("work", "new")]
    shorter = min(map(len, forests))
    pd.testing.assert_frame_equal(*(forest[:shorter] for forest in forests))


def test_changed_and_removed_files_are_named_and_nothing_of_theirs_is_used(tmp_path: Path, rows: np.ndarray) -> None:
    shards = {1: range(300), 2: range(300, 600), 3: range(600, 900)}
    folder = write_shards(tmp_path / "e", rows, shards)
    balance(tmp_path / "work", folder, threshold=0.5)
    shutil.move(folder / "img_emb" / "img_emb_0002.npy", tmp_path)
    shutil.move(folder / "metadata" / "metadata_0002.parquet", tmp_path)
    with pytest.raises(ClipcidError, match=r"6 files there, 4 now; changed or gone: img_emb_0002\.npy, metadata_0002"):
        balance(tmp_path / "work", folder, threshold=0.5)
    _, told = balance(tmp_path / "work", folder, threshold=0.5, overwrite=True)
    assert "cannot be extended" in told
    assert "(3 files there, 2 now; changed or gone: img_emb_0002.npy)" in told
    balance(tmp_path / "new", folder, threshold=0.5)
    assert read_outputs(tmp_path / "work") == read_outputs(tmp_path / "new")
    # Shards in another order.
    other = write_shards(tmp_path / "e", rows, {1: shards[3], 3: shards[1], 4: shards[2]})
    with pytest.raises(ClipcidError, match="made with other settings or inputs"):
        balance(tmp_path / "work", other, threshold=0.5)
    _, told = balance(tmp_path / "work", other, threshold=0.5, overwrite=True)
    assert "as they were and in that order (2 files there, 3 now): all pairs are compared" in told
    # A larger cut-off than the forest was searched to.
    write_shards(folder, rows, {5: range(10)})
    _, told = balance(tmp_path / "work", folder, threshold=0.6, keys="shard")
    assert "The forest that is there ends at distance 0.5000: all pairs are compared." in told


def test_the_forest_reaches_as_far_as_before(tmp_path: Path, rows: np.ndarray) -> None:
    shards = {1: range(500), 2: range(500, 900)}
    part = write_shards(tmp_path / "part", rows, {1: shards[1]})
    balance(tmp_path / "work", part, threshold=0.9)
    write_shards(part, rows, shards)
    balance(tmp_path / "work", part, threshold=0.2)
    _, told = balance(tmp_path / "work", part, threshold=0.9)
    assert "The forest of these embeddings exists" in told
    balance(tmp_path / "new", part, threshold=0.9)
    assert read_outputs(tmp_path / "work") == read_outputs(tmp_path / "new")


@pytest.mark.parametrize("entry", ["cutoff", "inputs"])
def test_a_damaged_sidecar_of_a_forest_is_named_until_it_is_overwritten(
    tmp_path: Path, rows: np.ndarray, entry: str
) -> None:
    part = write_shards(tmp_path / "e", rows, {1: range(100)})
    balance(tmp_path / "work", part, threshold=0.5)
    sidecar = tmp_path / "work" / "balance" / "forest.json"
    told_by = json.loads(sidecar.read_text())[entry]
    edit_sidecar(sidecar, lambda content: content.pop(entry))
    with pytest.raises(ClipcidError, match=rf"forest\.json cannot be read .* `{entry}`") as refused:
        balance(tmp_path / "work", part, threshold=0.45)
    assert "--overwrite" in refused.value.fix
    balance(tmp_path / "work", part, threshold=0.5, overwrite=True)
    balance(tmp_path / "work", part, threshold=0.45, overwrite=True)
    assert json.loads(sidecar.read_text())[entry] == (told_by if entry == "inputs" else pytest.approx(0.45))
