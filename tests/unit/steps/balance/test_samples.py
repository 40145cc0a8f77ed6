"""Samples of rows: the same ones from the index of the data as from its shards, which are then not listed."""

from __future__ import annotations

from pathlib import Path

import pytest
from balance_data import Listener
from uid_data import NUM_ROWS, UIDS, write_data

from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.balance.samples import SampleFinder, read_uid
from clipcid_cli.steps.data_index import ensure_index


def test_samples_come_from_the_index_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", UIDS)
    plain = open_dataset(data)
    with open_dist_context("cpu") as context:
        indexed = ensure_index(open_dataset(data, index_root=tmp_path / "index"), context, 0, Listener())
    rows = (3, 0, 31, 30, 999, NUM_ROWS - 1)
    keys = [f"{row:06d}" for row in rows]
    shards = [plain.shards[int(row >= NUM_ROWS // 2)].name for row in rows]
    expected = SampleFinder(plain).find(shards, keys)
    assert [read_uid(sample) for sample in expected] == [UIDS[3], UIDS[0], UIDS[31], UIDS[30], None, UIDS[-1]]
    foreign = ["another tool's file"] * len(keys)
    assert SampleFinder(plain).find(foreign, keys) == expected

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was listed")

    monkeypatch.setattr(Shard, "samples", refuse)
    for names in (shards, foreign):
        found = SampleFinder(indexed).find(names, keys)
        assert [None if sample is None else sample.key for sample in found] == [*keys[:4], None, keys[5]]
        for one, other in zip(found, expected, strict=True):
            if one is not None and other is not None:
                assert one.image.read() == other.image.read()
                assert read_uid(one) == read_uid(other)
