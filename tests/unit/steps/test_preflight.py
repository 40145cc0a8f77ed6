"""The look at the data before long work: which shards are looked at, for how long, and what is said of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from balance_data import heard
from conftest import make_image, shard_members, write_tar

from clipcid_cli.formats.data.dataset import Dataset, open_dataset
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.preflight import choose_order, validate_samples


@pytest.fixture(scope="module")
def context() -> DistContext:
    with open_dist_context("cpu") as opened:
        return opened


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of five samples; the last image of the fifth is cut off."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    for number in range(6):
        members = shard_members(10 * number, 5)
        if number == 4:
            members = [(name, make_image(1)[:60] if name == "000044.png" else data) for name, data in members]
        write_tar(folder / f"{number:05d}.tar", members)
    return folder


def check(dataset: Dataset, context: DistContext, *, dry_run: bool = True) -> list[str]:
    with heard() as told:
        validate_samples(dataset, context, 0, dry_run=dry_run)
    return told


def test_all_shards_are_looked_at_and_it_is_said_what_was_found(
    shards: Path, context: DistContext, tmp_path: Path
) -> None:
    dataset = open_dataset(shards, index_root=tmp_path)
    told = check(dataset, context)  # the first three samples of each: the cut image is the fifth
    assert told == [f"{shards}: checked 6 of 6 shards, 18 samples: all can be decoded."]
    assert check(dataset, context, dry_run=False) == []

    indexed = ensure_index(dataset, context, 0)
    said = f"{shards}: checked 6 of 6 shards, 18 samples: 1 cannot be decoded."  # first, middle and last of each
    assert check(indexed, context) == [f"{said}\n  1 × unreadable image: 00004/000044"]
    assert check(indexed, context, dry_run=False) == [said]  # the run names them at its end


def test_of_remote_data_a_dry_run_looks_at_few_shards_and_a_run_at_none(shards: Path) -> None:
    dataset = open_dataset(shards)
    for prefix, looked_at in (("https://example.org/", 4), ("pipe:cat ", 0)):
        remote = dataclasses.replace(
            dataset,
            shards=tuple(dataclasses.replace(shard, source=f"{prefix}{shard.file}") for shard in dataset.shards),
        )
        assert len(choose_order(remote, 0, dry_run=True)) == looked_at
        assert choose_order(remote, 0, dry_run=False) == []
