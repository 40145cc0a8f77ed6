"""The index of a data set: made once by all processes and their workers, then opened by every start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.activity import count_received
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.index import (
    DataIndex,
    IndexedShard,
    Part,
    finish_index,
    lock_index,
    open_index,
    read_record,
    write_part,
)
from clipcid_cli.formats.data.samples import Sample
from clipcid_cli.formats.skips import CAPTION_CHANGES, Skips
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.pipeline import default_workers, ordered_map
from clipcid_cli.steps import reporting

# Fewer shards than this are listed before a worker has started.
_FEW_SHARDS = 8


def note_captions(dataset: Dataset, read: Skips | None = None) -> dict[str, dict[str, int]]:
    """Say which captions are missing, by the keys that were named, and which are not used as they are stored.

    Args:
        read: What was counted when the data was read; by default, what its index says.

    Returns:
        The entries of the sidecar's counts, as far as there are such captions.
    """
    return note_counted_captions(dataset.caption_keys, read or count_captions(dataset))


def count_captions(dataset: Dataset) -> Skips:
    """Return what the index has counted; nothing where there is none."""
    counted = Skips()
    if dataset.index is not None:
        for record in dataset.index.records:
            counted.merge(record.skips)
    return counted


def note_counted_captions(caption_keys: Sequence[str], read_skips: Skips) -> dict[str, dict[str, int]]:
    """Say what was counted of captions, and return it, as `note_captions` does."""
    counts = dict[str, dict[str, int]]()
    if caption_keys and read_skips.without:
        counts["without_caption"] = read_skips.without
        numbers = ", ".join(f"{count:,} of {key}" for key, count in sorted(read_skips.without.items()))
        reporting.note(f"Samples without a caption: {numbers}.")
    if read_skips.changed:
        counts["captions"] = read_skips.changed
        changes = (
            f"{read_skips.changed[what]:,} {words}"
            for what, words in CAPTION_CHANGES.items()
            if what in read_skips.changed
        )
        reporting.note(f"Captions: {'; '.join(changes)}.")
    return counts


def stream_shard(dataset: Dataset, shard_index: int, skips: Skips) -> Iterator[Sample]:
    """Yield a shard's samples for a step that reads all of it: from the index, or else into it.

    A shard that is streamed is read in any case, and its samples come with their bytes. `skips` counts the samples left
    out; it is complete once all were taken.
    """
    shard = dataset.shards[shard_index]
    index = dataset.index
    if index is not None and not shard.is_streamed:
        skips.merge(index.skips(shard_index))
        part = index.part(shard_index)
        yield from map(part.sample, range(len(part)))
        return
    stamp = shard.stamp()
    listed = list[Sample]()
    for sample in shard.stream(skips):
        listed.append(sample.without_image_data())
        yield sample
    if dataset.index_folder is not None and index is None:
        write_part(dataset.index_folder, shard, stamp, listed, skips)


def _list_shard(dataset: Dataset, shard_index: int) -> None:
    for _ in stream_shard(dataset, shard_index, Skips()):
        pass


def ensure_index(dataset: Dataset, context: DistContext, workers: int) -> Dataset:
    """Return the data with its index, listing the shards that are not in it yet.

    Processes divide the shards among them, and each its part among its workers (0: itself); a stopped run continues.
    """
    folder = dataset.index_folder
    assert folder is not None, "opened without a folder for the index"
    if all(context.gather(dataset.index is not None)):
        return dataset

    def find_missing() -> list[int]:
        return [shard_index for shard_index, shard in enumerate(dataset.shards) if read_record(folder, shard) is None]

    def list_all(numbers: list[int]) -> None:
        with reporting.progress("index", len(numbers), "shards") as progress:
            lister = partial(_list_shard, dataset)
            for _ in ordered_map(lister, numbers, workers if len(numbers) > _FEW_SHARDS else 0, count_received):
                progress.advance()

    with lock_index(folder) if context.is_main else nullcontext():
        missing = context.on_rank0(find_missing)
        if missing:
            context.on_all(list_all, missing[context.rank :: context.size])
        return dataset.with_index(context.on_rank0(_finish, dataset, folder))


def index_alone(dataset: Dataset, workers: int | None) -> Dataset:
    """Return the data with its index, made by this process and its workers while others wait for what it finds."""
    alone = DistContext(0, 1, 0, torch.device("cpu"))
    return ensure_index(dataset, alone, default_workers(alone.device) if workers is None else workers)


def open_part(dataset: Dataset, shard_index: int) -> Part:
    """Return the samples of one shard from the index; a shard that is not in it yet is listed first."""
    if dataset.index is not None:
        return dataset.index.part(shard_index)
    folder = dataset.index_folder
    assert folder is not None, "opened without a folder for the index"
    return DataIndex(folder, (dataset.shards[shard_index],), (_find_record(dataset, folder, shard_index),)).part(0)


def _finish(dataset: Dataset, folder: Path) -> DataIndex:
    """Declare the index complete, unless another run has in the meantime."""
    index = open_index(folder, dataset.shards)
    if index is not None:
        return index
    # Those that changed while the others were listed are listed again.
    records = [_find_record(dataset, folder, shard_index) for shard_index in range(len(dataset.shards))]
    return finish_index(folder, dataset.shards, records)


def _find_record(dataset: Dataset, folder: Path, shard_index: int) -> IndexedShard:
    """Return what the listing of a shard found; it is listed where it has not been."""
    shard = dataset.shards[shard_index]
    record = read_record(folder, shard)
    if record is None:
        _list_shard(dataset, shard_index)
        record = read_record(folder, shard)
    if record is None:
        raise ClipcidError(
            f"Shard {shard.name} of {dataset.spec} changed while it was being listed.",
            "Run the same command again once nothing writes to the data.",
        )
    return record
