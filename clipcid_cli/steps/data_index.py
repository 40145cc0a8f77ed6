"""The index of a data set, made once by all processes and their workers, opened by every later start."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.index import finish_index, lock_index, open_index, read_record, write_part
from clipcid_cli.formats.data.samples import Shard
from clipcid_cli.formats.skips import Skips
from clipcid_cli.runtime.loading import load_batches
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.steps.reporting import Progress, Reporter

# Fewer shards than this are listed before a worker has started.
_FEW_SHARDS = 8


@dataclasses.dataclass(frozen=True)
class ListShards:
    """Lists shards into the index; sent to workers."""

    folder: Path
    shards: tuple[Shard, ...]

    def __call__(self, number: int) -> int:
        """List one shard and return how many samples it has."""
        shard, skips = self.shards[number], Skips()
        samples = shard.samples(skips)
        write_part(self.folder, number, shard, samples, len(samples) + skips.total, skips)
        return len(samples)


def ensure_index(dataset: Dataset, machine: Machine, workers: int, reporter: Reporter) -> Dataset:
    """Return the data with its index, listing the shards that are not in it yet.

    Processes divide the shards among them, and each its share among its workers; a stopped run continues.

    Args:
        dataset: Data opened with a folder for its index.
        workers: Worker processes of each process; 0 lists in the process itself.

    Raises:
        ClipcidError: when a shard is damaged, or a key occurs in two shards.
    """
    folder, shards = dataset.index_folder, dataset.shards
    assert folder is not None, "opened without a folder for the index"
    if all(machine.gather(dataset.index is not None)):
        return dataset
    with lock_index(folder) if machine.is_main else contextlib.nullcontext():
        missing = machine.on_main(lambda: _find_missing(folder, shards))
        mine = missing[machine.rank :: machine.size]
        with reporter.progress("index", len(mine), "shards") as progress:
            machine.on_all(lambda: _list(folder, shards, mine, workers, progress))
        machine.on_main(lambda: _finish(folder, shards))
    index = open_index(folder, shards)
    assert index is not None, "finished a moment ago"
    return dataclasses.replace(dataset, index=index)


def _find_missing(folder: Path, shards: Sequence[Shard]) -> list[int]:
    return [number for number, shard in enumerate(shards) if read_record(folder, number, shard) is None]


def _list(folder: Path, shards: tuple[Shard, ...], mine: list[int], workers: int, progress: Progress) -> None:
    for _ in load_batches(mine, ListShards(folder, shards), workers if len(mine) > _FEW_SHARDS else 0):
        progress.advance()


def _finish(folder: Path, shards: Sequence[Shard]) -> None:
    """Declare the index complete, unless another run has in the meantime."""
    if open_index(folder, shards) is None:
        records = [read_record(folder, number, shard) for number, shard in enumerate(shards)]
        finish_index(folder, shards, [record for record in records if record is not None])
