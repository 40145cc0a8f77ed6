"""Samples of rows: listed into the index of the data where it has none, and found there afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from uid_data import NUM_ROWS, UIDS, write_data

from clipcid_cli.formats.data.dataset import open_dataset
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.steps.balance import report
from clipcid_cli.steps.balance.balance_run import BalancePlan
from clipcid_cli.steps.balance.samples import SampleFinder, read_uid
from clipcid_cli.steps.data_index import index_alone
from clipcid_cli.steps.settings.balance import BalanceSettings


def test_samples_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", UIDS)
    plain = open_dataset(data, index_root=tmp_path / "index")
    rows = (3, 0, 31, 30, 999, NUM_ROWS - 1)
    keys = [f"{row:06d}" for row in rows]
    shards = [plain.shards[int(row >= NUM_ROWS // 2)].name for row in rows]
    expected = SampleFinder(plain, 0).find(shards, keys)
    assert [read_uid(sample) for sample in expected] == [UIDS[3], UIDS[0], UIDS[31], UIDS[30], None, UIDS[-1]]
    indexed = index_alone(plain, 0)

    def refuse(*_: object) -> None:
        raise AssertionError("a shard was listed")

    monkeypatch.setattr(Shard, "stream", refuse)
    monkeypatch.setattr(Shard, "samples", refuse)
    foreign = ["another tool's file"] * len(keys)
    for dataset in (plain, indexed):
        for names in (shards, foreign):
            assert SampleFinder(dataset, 0).find(names, keys) == expected


def test_a_report_lists_no_large_data_for_another_tools_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data(tmp_path / "data", UIDS)
    settings = BalanceSettings(keep=0.5, data=str(data), work=tmp_path / "work", workers=0)
    unread: Any = None  # the keys are given
    plan = BalancePlan(settings=settings, context=unread, embeddings=unread, clusters=None, seconds={})
    monkeypatch.setattr(report, "_MAX_LISTED", 1)
    gallery = report.Gallery(plan)
    assert gallery.read(["0.parquet"], ["000003"]) == [""]
    assert "has no index yet" in gallery.unread["0.parquet", "000003"]
    assert gallery.data is not None
    index_alone(gallery.data, 0)
    assert report.Gallery(plan).read(["0.parquet"], ["000003"])[0].startswith("data:")
