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
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import ByteRange, Sample
from clipcid_cli.formats.data.shard import Slices, cut
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.machine import open_machine
from clipcid_cli.steps.data_index import ensure_index
from clipcid_cli.steps.distill.batches import BatchOrder
from clipcid_cli.steps.distill.samples import Sources, match_samples
from clipcid_cli.steps.reporting import Reporter


@dataclasses.dataclass(frozen=True)
class ListedRows(Slices):
    """Slices of given sizes; every fifth sample has no caption."""

    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, number: int, skips: Skips) -> Iterator[Sample]:
        first = sum(self.sizes[:number])
        for row in range(first, first + self.sizes[number]):
            yield Sample(f"{row:05d}", ByteRange("none"), () if row % 5 == 4 else (f"caption {row}",))

    def stamp(self, number: int) -> tuple[int, int]:
        return self.sizes[number], sum(self.sizes[:number])

    def fingerprint(self, number: int) -> tuple[int, str]:
        return self.sizes[number], ""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orders")


def make_order(root: Path, sizes: list[int], seed: int, batch_size: int, dropped: int) -> tuple[BatchOrder, list[str]]:
    """Make the order of shards of some sizes, without every seventh sample, and list the keys it should hold."""
    folder = Path(tempfile.mkdtemp(dir=root))
    dataset = Dataset("none", "list", cut(ListedRows(tuple(sizes)), "none"), index_folder=folder / "index")
    with open_machine("cpu") as machine:
        dataset = ensure_index(dataset, machine, 0, Reporter())
    numbers = np.arange(sum(sizes))
    kept = numbers % 7 != dropped
    keys = [f"{number:05d}" for number in numbers]
    pq.write_table(pa.table({"key": keys, "kept": kept}), folder / "keep.parquet")
    matched = match_samples(dataset, Sources(folder / "keep.parquet"), 0.0, folder, Reporter())
    expected = [key for number, key in enumerate(keys) if kept[number] and number % 5 < 4]
    assert matched.training.total == matched.counts.selected == len(expected)
    return BatchOrder(dataset, matched.training, seed, batch_size), expected


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda sizes: sum(sizes) >= 10),
    seed=st.integers(0, 1000),
    processes=st.sampled_from([1, 2, 3, 4]),
    share=st.integers(1, 9),
    dropped=st.integers(0, 6),
)
@settings(max_examples=60)
def test_no_sample_is_lost_or_doubled(
    root: Path, sizes: list[int], seed: int, processes: int, share: int, dropped: int
) -> None:
    order, expected = make_order(root, sizes, seed, share * processes, dropped)
    epochs = 3
    steps = -(-epochs * len(expected) // order.batch_size)
    parts = [[share.items for share in order.iterate(0, steps, rank, processes)] for rank in range(processes)]
    seen = [item for step in range(steps) for part in parts for item in part[step]]
    counted: dict[int, Counter[str]] = {}
    for item in seen:
        counted.setdefault(item.epoch, Counter())[item.sample.key] += 1
    for epoch in range(epochs):
        assert counted[epoch] == Counter(expected)
    whole, _ = make_order(root, sizes, seed, share * processes, dropped)
    alone = [item for step in range(steps) for item in whole.items(step, 0, 1)]
    assert [(item.epoch, item.sample.key, item.row) for item in seen] == [
        (item.epoch, item.sample.key, item.row) for item in alone
    ]


@given(seed=st.integers(0, 50), start=st.integers(0, 20))
@settings(max_examples=20)
def test_resuming_anywhere_goes_on_with_the_same_batches(root: Path, seed: int, start: int) -> None:
    order, _ = make_order(root, [9, 17, 4], seed, 6, 0)
    later, _ = make_order(root, [9, 17, 4], seed, 6, 0)
    full, rest = (
        [[(item.epoch, item.row, item.sample.key) for item in share.items] for share in order.iterate(first, 25, 0, 1)]
        for order, first in ((order, 0), (later, start))
    )
    assert rest == full[start:]


def test_epochs_and_seeds_differ(root: Path) -> None:
    keys = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order, expected = make_order(root, [30, 30], seed, 1, 0)
        total = len(expected)
        keys.append([order.items(epoch * total + step, 0, 1)[0].sample.key for step in range(total)])
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2])
    assert keys[0] != keys[1]
    assert keys[0] != keys[2]
