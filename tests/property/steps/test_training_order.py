"""The order of training: every sample once an epoch, for any batch size and number of processes, across epochs' ends."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.data.shard import Shard
from clipcid_cli.formats.fingerprint import FileRecord
from clipcid_cli.formats.results.matched_samples import open_rows
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.distributed import DistContext, open_dist_context
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.distill.batches import Batches, Item
from clipcid_cli.steps.distill.inputs import Inputs
from clipcid_cli.steps.distill.samples import Sources, count_usable, match_samples
from clipcid_cli.steps.distill.teachers import Teacher
from clipcid_cli.steps.settings.distill import DistillSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedRows(Shard):
    """Some rows of a data set; every fifth sample has no caption."""

    first: int
    size: int

    def _read_own(self, skips: Skips) -> Iterator[Sample]:
        for row in range(self.first, self.first + self.size):
            yield Sample(f"{row:05d}", ByteRange("none"), () if row % 5 == 4 else (f"caption {row}",))

    @property
    def file(self) -> str:
        return ""

    def stamp(self) -> tuple[int, int]:
        return self.size, self.first

    def fingerprint(self) -> FileRecord:
        return FileRecord(self.name, self.size, "")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


def make_inputs(root: Path, sizes: list[int], dropped: int) -> tuple[Inputs, list[str]]:
    """Make the inputs of shards of some sizes, without every seventh sample, and list the keys they should hold."""
    folder = Path(tempfile.mkdtemp(dir=root))
    shards = tuple(
        ListedRows(f"{index:05d}", "none", first=sum(sizes[:index]), size=size) for index, size in enumerate(sizes)
    )
    dataset = Dataset("none", "list", shards, index_folder=folder / "index")
    with open_dist_context("cpu") as context:
        dataset = ensure_index(dataset, context, 0)
    numbers = np.arange(sum(sizes))
    kept = numbers % 7 != dropped
    keys = [f"{number:05d}" for number in numbers]
    pq.write_table(pa.table({"key": keys, "kept": kept}), folder / "keep.parquet")
    counts = match_samples(dataset, Sources(folder / "keep.parquet"), 0.0, folder)
    training, held_out = open_rows(folder, "training"), open_rows(folder, "held_out")
    expected = [key for number, key in enumerate(keys) if kept[number] and number % 5 < 4]
    assert training.total == counts.selected == len(expected)
    found = Inputs(
        settings=DistillSettings(student="student.json"),
        dataset=dataset,
        usable=count_usable(dataset, 1.0),
        training=training,
        held_out=held_out,
        keep_list=None,
        teacher=Teacher(),
        clusters=None,
        fingerprints=[],
    )
    return found, expected


def deal(inputs: Inputs, seed: int, batch_size: int, steps: range, rank: int = 0, size: int = 1) -> list[list[Item]]:
    """Return what one process shows in each step."""
    context = DistContext(rank, size, rank, torch.device("cpu"))
    batches = Batches(inputs, lambda _: NotImplemented, None, batch_size, seed, context)
    return [[item for part in dealt.work for item in part.items] for dealt in batches.deal(steps)]


def test_another_seed_is_another_order(root: Path) -> None:
    inputs, expected = make_inputs(root, [30, 30], 0)
    one, other = ([item.row for item in deal(inputs, seed, len(expected), range(1))[0]] for seed in (0, 1))
    assert sorted(one) == sorted(other)
    assert one != other


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda sizes: sum(sizes) >= 10),
    seed=st.integers(0, 1000),
    processes=st.sampled_from([1, 2, 3, 4]),
    share=st.integers(1, 9),
    dropped=st.integers(0, 6),
)
@settings(max_examples=20)
def test_no_sample_is_lost_or_doubled(
    root: Path, sizes: list[int], seed: int, processes: int, share: int, dropped: int
) -> None:
    inputs, expected = make_inputs(root, sizes, dropped)
    epochs, batch_size = 3, share * processes
    steps = range(-(-epochs * len(expected) // batch_size))
    parts = [deal(inputs, seed, batch_size, steps, rank, processes) for rank in range(processes)]
    seen = [item for step in steps for part in parts for item in part[step]]
    counted: dict[int, Counter[str]] = {}
    for item in seen:
        counted.setdefault(item.epoch, Counter())[item.sample.key] += 1
    for epoch in range(epochs):
        assert counted[epoch] == Counter(expected)
    assert seen == [item for step in deal(inputs, seed, batch_size, steps) for item in step]


@given(seed=st.integers(0, 50), start=st.integers(0, 20))
@settings(max_examples=8)
def test_resuming_anywhere_goes_on_with_the_same_batches(root: Path, seed: int, start: int) -> None:
    inputs, _ = make_inputs(root, [9, 17, 4], 0)
    assert deal(inputs, seed, 6, range(start, 25)) == deal(inputs, seed, 6, range(25))[start:]
