"""What `balance` writes for other tools: DataComp's subset, pairs, keys; from keys, metadata or attributes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from balance_data import make_rows, write_embeddings
from uid_data import NUM_ROWS, UIDS, balance, datacomp_subset, write_data

from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.steps.settings.balance import BalanceSettings


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


def test_pairs_join_with_the_keep_list_and_nothing_is_searched_for_them(rows: np.ndarray, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", rows, keys=UIDS)
    first = balance(tmp_path / "w", folder)
    keep = pd.read_parquet(first["files"]["keep_list"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w" / "balance").glob("[!.]*")}
    asked = {name: tmp_path / "out" / file for name, file in (("uids", "u.npy"), ("pairs", "p.csv"), ("keys", "k.txt"))}
    result = balance(tmp_path / "w", folder, **{f"write_{name}": path for name, path in asked.items()})
    assert result["files"] == first["files"] | {name: str(path) for name, path in asked.items()}
    assert {path: path.stat().st_mtime_ns for path in before} == before

    dropped = keep[~keep["kept"]]
    pairs = pd.read_csv(asked["pairs"])
    assert pairs.columns.tolist() == ["from", "to", "distance"]
    joined = pairs.merge(keep, left_on="from", right_on="key", validate="1:1")
    assert joined["from"].tolist() == dropped["key"].tolist()
    assert joined["to"].tolist() == joined["representative"].tolist()
    assert set(joined["to"]) <= set(keep[keep["kept"]]["key"])
    assert np.array_equal(joined["distance_x"].astype(np.float32), joined["distance_y"])
    balance(tmp_path / "w", folder, write_pairs=tmp_path / "p.parquet")
    table = pd.read_parquet(tmp_path / "p.parquet")
    assert table["distance"].dtype == np.float32
    assert table["distance"].tolist() == dropped["distance"].tolist()
    kept = keep[keep["kept"]]["key"].tolist()
    assert asked["keys"].read_text().splitlines() == kept
    assert np.array_equal(np.load(asked["uids"]), datacomp_subset(kept))
    with pytest.raises(ClipcidError, match=r"u\.npy already exists"):
        balance(tmp_path / "w", folder, keep=0.6, write_uids=asked["uids"])
    with pytest.raises(UsageError, match=r"neither a \.parquet nor a \.csv file"):
        BalanceSettings(keep=0.5, write_pairs=tmp_path / "p.txt")


def test_uids_come_from_metadata_or_from_attributes(rows: np.ndarray, tmp_path: Path) -> None:
    """Keys are numbers, as img2dataset gives them; the uids lie beside them in one of two places."""
    folder = write_embeddings(tmp_path / "e", rows)
    with pytest.raises(ClipcidError, match="Sample '000000' has no uid of DataComp's") as refused:
        balance(tmp_path / "w", folder, write_uids=tmp_path / "u.npy")
    assert "--write-keys" in refused.value.fix
    # That was said before the search.
    assert not (tmp_path / "w" / "balance").exists()

    data = write_data(tmp_path / "data", UIDS)
    result = balance(tmp_path / "w", folder, data=str(data), write_uids=tmp_path / "u.npy")
    keep = pd.read_parquet(result["files"]["keep_list"])
    expected = datacomp_subset([UIDS[row] for row in np.flatnonzero(keep["kept"])])
    assert np.array_equal(np.load(tmp_path / "u.npy"), expected)

    last = int(np.flatnonzero(keep["kept"])[-1])
    lacking = write_data(tmp_path / "lacking", [None if row == last else uid for row, uid in enumerate(UIDS)])
    with pytest.raises(ClipcidError, match=f"Sample '{last:06d}' has no uid"):
        balance(tmp_path / "w", folder, data=str(lacking), write_uids=tmp_path / "v.npy")

    for number, part in enumerate(np.array_split(np.arange(NUM_ROWS), 2)):
        path = folder / "metadata" / f"metadata_{number}.parquet"
        pd.read_parquet(path).assign(uid=[UIDS[row] for row in part]).to_parquet(path)
    balance(tmp_path / "m", folder, write_uids=tmp_path / "m.npy")
    assert (tmp_path / "m.npy").read_bytes() == (tmp_path / "u.npy").read_bytes()


def test_files_that_were_renamed_since_are_named_where_their_names_are_in_the_keys(
    rows: np.ndarray, tmp_path: Path
) -> None:
    folder = write_embeddings(tmp_path / "e", rows, keys=UIDS)
    for path in (folder / "metadata").iterdir():
        frame = pd.read_parquet(path)
        frame.assign(uid=frame["key"]).to_parquet(path)
    balance(tmp_path / "w", folder, keys="shard")
    for path in sorted(folder.rglob("*_1.*")):
        path.rename(path.with_name(path.name.replace("_1.", "_7.")))
    with pytest.raises(ClipcidError, match=r"has keys that .*e does not have"):
        balance(tmp_path / "w", folder, keys="shard", write_uids=tmp_path / "u.npy")
    assert not (tmp_path / "u.npy").exists()


def test_an_archive_balances_as_the_same_rows_in_clip_retrievals_layout(rows: np.ndarray, tmp_path: Path) -> None:
    plain = write_embeddings(tmp_path / "plain", rows, keys=UIDS)
    (tmp_path / "pool").mkdir()
    for number, part in enumerate(np.array_split(np.arange(NUM_ROWS), 2)):
        np.savez(
            tmp_path / "pool" / f"{number}f.npz", b32_img=rows[part][:, ::-1], l14_img=rows[part], l14_txt=rows[part]
        )
        pd.DataFrame({"uid": np.array(UIDS)[part], "text": "x"}).to_parquet(tmp_path / "pool" / f"{number}f.parquet")
    balance(tmp_path / "a", plain)
    result = balance(tmp_path / "b", tmp_path / "pool", npz_array="l14_img", write_uids=tmp_path / "u.npy")
    one, other = (pd.read_parquet(tmp_path / work / "balance" / "keep.parquet") for work in "ab")
    pd.testing.assert_frame_equal(one.drop(columns="shard"), other.drop(columns="shard"))
    assert np.array_equal(np.load(tmp_path / "u.npy"), datacomp_subset(one[one["kept"]]["key"].tolist()))
    assert result["kept"] == one["kept"].sum()
    # Another array of the same archives is another input.
    with pytest.raises(ClipcidError, match="made with other settings or inputs"):
        balance(tmp_path / "b", tmp_path / "pool", npz_array="b32_img")
    balance(tmp_path / "b", tmp_path / "pool", npz_array="l14_img", select="similarity")
