"""New shards where the embeddings are another tool's, and where a run was killed in between."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from balance_data import make_rows, write_embeddings
from uid_data import NUM_ROWS, UIDS, balance, write_data

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.balance import write_shards


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two read-only shards of 30 samples, whose attributes hold uids."""
    return write_data(tmp_path_factory.mktemp("data") / "pool", UIDS)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def tar_keys(folder: Path) -> list[str]:
    """List the keys of the shards of a folder, in order."""
    names = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            names += [name.removesuffix(".png") for name in archive.getnames() if name.endswith(".png")]
    return names


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.name != "write-shards.json"}


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


def test_a_run_killed_between_shards_goes_on_and_ends_with_the_same_bytes(
    rows: np.ndarray, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ["00000000"] * 30 + ["00000001"] * 30
    folder = write_embeddings(tmp_path / "e", rows, shards=shards)
    asked = {"data": str(data), "keep": 0.4}
    balance(tmp_path / "w", folder, **asked, write_shards=tmp_path / "whole")
    copied = []
    copy = write_shards.copy_samples

    def die_at_second(source: Path, *given: Any) -> Any:
        if len(copied) == 1:
            copy(source, *given)
            raise KeyboardInterrupt
        copied.append(source.name)
        return copy(source, *given)

    monkeypatch.setattr(write_shards, "copy_samples", die_at_second)
    with pytest.raises(KeyboardInterrupt):
        balance(tmp_path / "w", folder, **asked, write_shards=tmp_path / "killed")
    # The second tar is there, and what it holds was not written down yet.
    assert sorted(path.name for path in (tmp_path / "killed").glob(".write-shards-*/0*")) == [
        "00000000.tar",
        "00000000_stats.json",
        "00000001.tar",
    ]
    monkeypatch.setattr(
        write_shards, "copy_samples", lambda source, *given: (copied.append(source.name), copy(source, *given))[1]
    )
    balance(tmp_path / "w", folder, **asked, write_shards=tmp_path / "killed")
    assert copied == ["00000000.tar", "00000001.tar"]
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_a_shard_that_keeps_nothing_has_statistics_and_no_tar(data: Path, tmp_path: Path) -> None:
    rows = np.repeat(make_rows(1), NUM_ROWS, axis=0)
    folder = write_embeddings(tmp_path / "e", rows)
    balance(tmp_path / "w", folder, data=str(data), threshold=0.0, keep=None, write_shards=tmp_path / "out")
    assert read_json(tmp_path / "out" / "sizes.json") == {"00000000.tar": 1}
    assert not (tmp_path / "out" / "00000001.tar").exists()
    stats = read_json(tmp_path / "out" / "00000001_stats.json")
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (30, 0, {"repeat": 30})
