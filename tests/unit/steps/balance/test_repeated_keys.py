"""Keys that repeat over shards, and what tells them apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from balance_data import balance, make_rows, read_keep, write_embeddings

from clipcid_cli.errors import ClipcidError


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_rows(20)


def test_keys_that_repeat_in_a_foreign_folder_are_refused_until_told_apart(rows: np.ndarray, tmp_path: Path) -> None:
    keys, shards = [f"{row % 10}" for row in range(20)], ["a"] * 10 + ["b"] * 10
    folder = write_embeddings(tmp_path / "e", rows, keys=keys, shards=shards)
    with pytest.raises(ClipcidError, match="Key '0' belongs to rows 0 and 10") as refused:
        balance(tmp_path, folder, keep=0.5)
    assert "--keys shard" in refused.value.fix
    balance(tmp_path, folder, keep=0.5, keys="shard")
    assert read_keep(tmp_path)["key"].tolist() == [f"{shard}/{key}" for shard, key in zip(shards, keys, strict=True)]


def test_the_same_command_with_other_keys_writes_them(rows: np.ndarray, tmp_path: Path) -> None:
    folder = write_embeddings(tmp_path / "e", rows, shards=["a"] * 10 + ["b"] * 10)
    balance(tmp_path, folder, keep=0.5)
    names = read_keep(tmp_path)["key"]
    _, told = balance(tmp_path, folder, keep=0.5, keys="shard")
    assert "The forest of these embeddings exists" in told
    assert read_keep(tmp_path)["key"].tolist() == [f"{'ab'[row >= 10]}/{name}" for row, name in enumerate(names)]
