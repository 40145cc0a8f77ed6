"""What `balance` writes beside its keep list: DataComp's uids, and new shards; where their samples are found."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from balance_data import make_rows, write_embeddings
from uid_data import NUM_ROWS, UIDS, balance, datacomp_subset, write_data

from clipcid_cli.errors import ClipcidError


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two read-only shards of 30 samples, whose attributes hold uids."""
    return write_data(tmp_path_factory.mktemp("data") / "pool", UIDS)


def test_uids_come_from_metadata_or_from_attributes(rows: np.ndarray, data: Path, tmp_path: Path) -> None:
    """Keys are numbers, as img2dataset gives them; the uids lie beside them in one of two places."""
    folder = write_embeddings(tmp_path / "e", rows)
    with pytest.raises(ClipcidError, match="Sample '000000' has no uid of DataComp's") as refused:
        balance(tmp_path / "w", folder, write_uids=tmp_path / "u.npy")
    assert "--write-keys" in refused.value.fix
    assert not (tmp_path / "w" / "balance").exists(), "that was said before the search"

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
    balance(tmp_path / "m", folder, keys="shard", write_uids=tmp_path / "m.npy")
    assert (tmp_path / "m.npy").read_bytes() == (tmp_path / "u.npy").read_bytes()
    # Files that were renamed since, where their names are in the keys.
    for path in sorted(folder.rglob("*_1.*")):
        path.rename(path.with_name(path.name.replace("_1.", "_7.")))
    with pytest.raises(ClipcidError, match=r"has keys that .*e does not have"):
        balance(tmp_path / "m", folder, keys="shard", write_uids=tmp_path / "n.npy")
    assert not (tmp_path / "n.npy").exists()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def tar_keys(folder: Path) -> list[str]:
    """List the keys of the shards of a folder, in order."""
    names = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            names += [name.removesuffix(".png") for name in archive.getnames() if name.endswith(".png")]
    return names


@pytest.mark.parametrize("keys", [None, UIDS], ids=["keys", "uids"])
def test_samples_are_found_where_the_shard_was_not_recorded(
    rows: np.ndarray, data: Path, tmp_path: Path, keys: list[str] | None
) -> None:
    """clip-retrieval records keys, DataComp's metadata uids, and neither the tar that a row came from."""
    folder = write_embeddings(tmp_path / "e", rows, num_files=3, keys=keys)
    result = balance(tmp_path / "w", folder, data=str(data), write_shards=tmp_path / "out")
    kept = pd.read_parquet(result["files"]["keep_list"])["kept"].to_numpy()
    assert tar_keys(tmp_path / "out") == [f"{row:06d}" for row in np.flatnonzero(kept)]
    sizes = {f"{number:08d}.tar": int(part.sum()) for number, part in enumerate(np.array_split(kept, 2))}
    assert list(read_json(tmp_path / "out" / "sizes.json").items()) == list(sizes.items())
    stats = read_json(tmp_path / "out" / "00000001_stats.json")
    assert stats["status_dict"] == {"success": sizes["00000001.tar"], "repeat": 30 - sizes["00000001.tar"]}


def test_other_data_is_refused_and_missing_samples_are_said(rows: np.ndarray, data: Path, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", rows, keys=[f"other/{row}" for row in range(NUM_ROWS)])
    with pytest.raises(ClipcidError, match="Of the 30 images kept, none are in the 2 shards"):
        balance(tmp_path / "w", folder, data=str(data), write_shards=tmp_path / "none")
    # A pool as it was downloaded lacks some of what the metadata name.
    names = [f"gone/{row}" if row < 10 else f"{row:06d}" for row in range(NUM_ROWS)]
    folder = write_embeddings(tmp_path / "part", rows, keys=names)
    result = balance(tmp_path / "v", folder, data=str(data), write_shards=tmp_path / "out")
    keep = pd.read_parquet(result["files"]["keep_list"])
    counts = read_json(tmp_path / "out" / "write-shards.json")["counts"]
    assert counts["missing"] == keep["kept"][:10].sum() > 0
    assert counts["samples"] == keep["kept"][10:].sum()
    assert read_json(tmp_path / "out" / "00000000_stats.json")["status_dict"]["not_in_keep_list"] == 10


def test_a_shard_that_keeps_nothing_has_statistics_and_no_tar(data: Path, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", np.repeat(make_rows(1), NUM_ROWS, axis=0))
    balance(tmp_path / "w", folder, data=str(data), threshold=0.0, keep=None, write_shards=tmp_path / "out")
    assert read_json(tmp_path / "out" / "sizes.json") == {"00000000.tar": 1}
    assert not (tmp_path / "out" / "00000001.tar").exists()
    stats = read_json(tmp_path / "out" / "00000001_stats.json")
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (30, 0, {"repeat": 30})
