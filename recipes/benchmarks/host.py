"""What the host does with each row of a partitioned `balance`: microseconds of processor time a row, in one thread.

    python recipes/benchmarks/host.py                       4 million rows, and 100,000 whose 768 numbers are read
    python recipes/benchmarks/host.py --rows 16000000

Sets have four rows from anywhere on average; 0.44 of the rows are dropped, as by --keep 0.563. "alone" is done by the first
process while the others wait, "shared" by all, each its share. `lists` is what takes longest of what is written at once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from balance import describe_machine

from clipcid_cli.algorithms.near.edges import Edges, sort_edges
from clipcid_cli.algorithms.near.partitions import group_rows
from clipcid_cli.algorithms.sets.components import connected_components
from clipcid_cli.algorithms.sets.forest import ForestSink, forest_curve
from clipcid_cli.algorithms.sets.representatives import central_rows, distances_to, find_diameters
from clipcid_cli.formats.embeddings.rows import FileRows, find_npy
from clipcid_cli.formats.parquet import read_first_column
from clipcid_cli.formats.results.forest import StoredForest, forest_spec, write_forest
from clipcid_cli.formats.results.keep_list import write_keep_list
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.steps.balance.groups import Groups
from clipcid_cli.steps.balance.rows import read_rows
from clipcid_cli.steps.balance.shared_arrays import SharedArrays

DROPPED = 0.437
VISITS = 3.2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--read", type=int, default=100_000, help="rows whose numbers are read")
    parser.add_argument("--width", type=int, default=768)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine(1))
    with tempfile.TemporaryDirectory() as scratch:
        measure_alone(Path(scratch), arguments.rows)
        measure_shared(Path(scratch), arguments.rows, arguments.read, arguments.width)


@contextmanager
def timed(who: str, what: str, rows: int) -> Iterator[None]:
    """Print the processor time that the block takes for each row."""
    began = time.process_time()
    yield
    print(f"{who:>6} {what:<34} {(time.process_time() - began) / rows * 1e6:6.3f} µs a row", flush=True)


def measure_alone(folder: Path, rows: int) -> None:
    """Measure what the first process does."""
    forest = make_forest(rows)
    with timed("alone", "hashes compared", rows):
        Groups.from_hashes(np.random.default_rng(1).integers(0, 2**64, rows, np.uint64))
    parts = [forest[at::2] for at in range(2)]
    sink = ForestSink(rows, parts[0])
    with timed("alone", "last of the merges", rows):
        sink.add(parts[1])
        sink.result()
    with timed("alone", "forest written", rows):
        (folder / "rows.parquet").write_bytes(b"")
        spec = forest_spec(folder, [], "partitioned", overwrite=False)
        write_forest(spec, StoredForest(forest.a, forest.b, forest.weight, 1.0, rows), folder / "rows.parquet", {})
    with timed("alone", "sets labelled", rows):
        labels = connected_components(rows, forest.a, forest.b)
    with timed("alone", "sets listed", rows):
        Groups.from_sets(labels)
    with timed("alone", "curve, while sets are measured", rows):
        forest_curve(rows, forest, float(forest.weight[-1]))
    keys, shards = (pa.array(np.arange(rows) // size).cast(pa.large_string()) for size in (1, 10_000))
    distances = np.random.default_rng(2).random(rows, np.float32)
    with timed("alone", "lists", rows):
        write_keep_list(
            folder / "keep.parquet",
            keys=keys,
            shards=shards,
            labels=labels,
            representatives=labels,
            distances=distances,
        )


def make_forest(rows: int) -> Edges:
    """Join rows from anywhere to chains of four on average, and drop the heaviest edges."""
    random = np.random.default_rng(0)
    center = random.integers(0, rows // 4, rows, np.int32)
    order = np.argsort(center).astype(np.int32)
    is_joined = center[order[:-1]] == center[order[1:]]
    a, b = order[:-1][is_joined], order[1:][is_joined]
    weight = random.random(len(a), np.float32)
    return sort_edges(Edges(np.minimum(a, b), np.maximum(a, b), weight))[: round(DROPPED * rows)]


def measure_shared(folder: Path, rows: int, read: int, width: int) -> None:
    """Measure what all processes do."""
    random = np.random.default_rng(0)
    partitions = round(rows**0.5)
    home, visited = (random.integers(0, partitions, count, np.int32) for count in (rows, round(VISITS * rows)))
    lists = np.concatenate([2 * home, 2 * visited + 1])
    listed = np.concatenate([np.arange(rows), random.integers(0, rows, len(visited))]).astype(np.int32)
    starts = range(0, len(lists), 2**20)

    def entries() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from ((lists[at : at + 2**20], listed[at : at + 2**20]) for at in starts)

    with timed("shared", "lists of partitions made", rows):
        group_rows(entries, 2 * partitions, lambda length: np.empty(length, np.int32))
    columns = {"key": np.arange(10_000).astype(str), "shard": ["00000"] * 10_000, "caption": [9 * "word "] * 10_000}
    pq.write_table(pa.table(columns), folder / "metadata.parquet", compression="zstd")
    with timed("shared", "keys and shards read", 50 * 10_000):
        for _ in range(50):
            for name in ("key", "shard"):
                read_first_column(folder / "metadata.parquet", (name,), pa.large_string(), "")
    stored = random.standard_normal((read, width), np.float32)
    stored = (stored / np.linalg.norm(stored, axis=1, keepdims=True)).astype(np.float16)
    np.save(folder / "rows.npy", stored)
    with open_dist_context("cpu") as context, timed("shared", "rows looked at", read):
        images = FileRows([find_npy(folder / "rows.npy")], width, as_stored=True)
        read_rows(SharedArrays(context, folder), images)
    copy = np.memmap(folder / "copy", np.float16, "w+", shape=stored.shape)
    with timed("shared", "rows copied, once of twice", read):
        copy[random.permutation(read)] = stored
    forest = make_forest(read)
    groups = Groups.from_sets(connected_components(read, forest.a, forest.b))
    labels = np.repeat(groups.bounds[:-1], np.diff(groups.bounds))
    with timed("shared", "sets measured", read):
        chosen = central_rows(lambda places: stored[groups.rows[places]], labels)
        distances_to(lambda places: stored[groups.rows[places]], chosen)
        numbers = np.arange(len(labels))
        find_diameters(
            lambda places: stored[groups.rows[places]], numbers, labels, groups.bounds[:-1], torch.device("cpu")
        )


if __name__ == "__main__":
    main()
