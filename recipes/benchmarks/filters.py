"""What do the parts of `balance` beside the search cost at a million rows: references, caption window, cap, sets, diameters?

    python recipes/benchmarks/filters.py                    1,000,000 rows of width 64, 10,000 references: 3 minutes, 1 GB
    python recipes/benchmarks/filters.py --rows 100000

Embeddings with captions are drawn, in files of another tool, and references of which a tenth are near copies of rows. A
folder of clusters is written as `cluster` would leave it. Then `balance` runs in this process, with all of them at once, and
each part's processor time (of all threads) and wall-clock time is taken around the call of the step; the search is
partitioned, so that the whole takes minutes. Where other programs run, only processor time means something.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from balance import describe_machine, unit

from clipcid_cli.formats.fingerprint import record
from clipcid_cli.formats.output import OutputSpec, open_output
from clipcid_cli.formats.results.clusters import ClusterSidecar
from clipcid_cli.steps.balance import compute, partition, report, run, sets, write
from clipcid_cli.steps.balance.filters.against import Against
from clipcid_cli.steps.balance.filters.captions import Captions
from clipcid_cli.steps.balance.filters.cluster_cap import MaxPerCluster
from clipcid_cli.steps.settings.balance import BalanceSettings

CLUSTER_SIZE = 200


def main() -> None:
    """Print a line for each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--select", default="central")
    arguments = parser.parse_args()
    print(describe_machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))))
    print(
        f"{arguments.rows:,} rows of width {arguments.width} in {arguments.shards:,} files, {arguments.references:,} "
        f"reference rows, threshold {arguments.threshold:g}, --select {arguments.select}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        draw_data(folder, arguments)
        taken = watch_parts()
        settings = BalanceSettings(
            work=folder / "work",
            embeddings=folder / "embeddings",
            threshold=arguments.threshold,
            neighbors="partitioned",
            select=arguments.select,
            against=(str(folder / "references"),),
            min_caption_similarity=0.3,
            max_per_cluster=CLUSTER_SIZE // 4,
            clusters=folder / "clusters",
            device="cpu",
        )
        result = timed(run.run, "whole command", taken)(settings)
    print(
        f"dropped: {result.against.dropped:,} near a reference, {result.caption_window.below:,} below the "
        f"window, {result.components:,} left of the search, of which the cap drops {result.cluster_cap.dropped:,}"
    )
    print(f"{'part':>40} {'CPU s':>8} {'wall s':>8}")
    for name, (cpu, wall) in taken.items():
        print(f"{name:>40} {cpu:8.2f} {wall:8.2f}")


def watch_parts() -> dict[str, tuple[float, float]]:
    """Take the time of the functions that are the parts; returns where it is added up."""
    taken: dict[str, tuple[float, float]] = {}
    parts: list[tuple[Any, str, str]] = [
        (compute, "read_rows", "read rows, find copies"),
        (Against, "apply", "--against"),
        (Captions, "apply", "caption window"),
        (compute, "divide", "search"),
        (compute, "measure_sets", "sets"),
        (sets, "_measure", "of these, distances and diameters"),
        (partition, "audit_kept", "audit"),
        (MaxPerCluster, "apply", "--max-per-cluster"),
        (report, "find_chains", "chains of the report"),
        (write, "write_list", "keep list"),
        (write, "write_sets", "sets, curve"),
        (write, "write_report", "report, chains included"),
    ]
    for owner, name, label in parts:
        setattr(owner, name, timed(getattr(owner, name), label, taken))
    return taken


def timed(call: Callable[..., Any], label: str, taken: dict[str, tuple[float, float]]) -> Callable[..., Any]:
    """Add the time of each call to what was taken under a label."""

    @functools.wraps(call)
    def run_timed(*given: Any, **named: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            before = taken.get(label, (0.0, 0.0))
            taken[label] = before[0] + time.process_time() - cpu, before[1] + time.perf_counter() - wall

    return run_timed


def draw_data(folder: Path, arguments: argparse.Namespace) -> None:
    """Write embeddings with captions, references and clusters."""
    generator, width = np.random.default_rng(0), arguments.width
    centres = unit(generator.standard_normal((arguments.rows // 4, width), dtype=np.float32))
    num_copies = arguments.references // 10
    near: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for number, part in enumerate(np.array_split(np.arange(arguments.rows), arguments.shards)):
        label = generator.integers(len(centres), size=len(part))
        spread = generator.uniform(0.02, 0.6, size=(len(part), 1)).astype(np.float32) / width**0.5
        rows = unit(centres[label] + spread * generator.standard_normal((len(part), width), dtype=np.float32))
        mixed = generator.uniform(0.0, 3.0, size=(len(part), 1)).astype(np.float32) / width**0.5
        texts = unit(rows + mixed * generator.standard_normal(rows.shape, dtype=np.float32))
        captions = [f"a photo of thing {each} beside thing {row}" for each, row in zip(label, part, strict=True)]
        write_shard(folder / "embeddings", number, rows, [f"{row:09d}" for row in part], texts, captions)
        near.append(rows[: -(-num_copies // arguments.shards)])
        labels.append(label.astype(np.int32) // (CLUSTER_SIZE // 4))
    copies = np.concatenate(near)[:num_copies]
    copies = unit(copies + 0.02 / width**0.5 * generator.standard_normal(copies.shape, dtype=np.float32))
    others = unit(generator.standard_normal((arguments.references - len(copies), width), dtype=np.float32))
    keys = [f"r{row:06d}" for row in range(arguments.references)]
    write_shard(folder / "references", 0, np.concatenate([copies, others]), keys, None, None)
    write_clusters(folder / "clusters", np.concatenate(labels), generator)


def write_shard(
    folder: Path,
    number: int,
    rows: np.ndarray,
    keys: list[str],
    texts: np.ndarray | None,
    captions: list[str] | None,
) -> None:
    """Write the files of one shard as another tool would."""
    sides = {"img_emb": rows} | ({} if texts is None else {"text_emb": texts})
    for name, each in sides.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / f"{name}_{number:04d}.npy", each.astype(np.float16))
    (folder / "metadata").mkdir(exist_ok=True)
    columns = {"key": keys} | ({} if captions is None else {"caption": captions})
    pq.write_table(pa.table(columns), folder / "metadata" / f"metadata_{number:04d}.parquet")


def write_clusters(folder: Path, labels: np.ndarray, generator: np.random.Generator) -> None:
    """Write a table of clusters and its sidecar: what the cap reads of them."""
    keys = pa.array([f"{row:09d}" for row in range(len(labels))])
    similarity = generator.random(len(labels), np.float32)
    table = pa.table({"key": keys, "cluster": labels, "similarity": similarity})
    unknown = {"embeddings": "", "keep_list": None, "model": None, "num_nearest": 0, "seconds": {}}
    result = {
        "images": len(labels),
        "clusters": int(labels.max()) + 1,
        "objective": 0.0,
        "iterations": 0,
        "seconds": {},
    }
    with open_output(OutputSpec(folder, "cluster", ClusterSidecar, settings={}, inputs=[])) as output:
        output.begin_work()
        pq.write_table(table, output.work / "clusters.parquet")
        written = [record(output.work / "clusters.parquet", output.work)]
        entries = {"counts": {"skipped": {}}, "temperatures": {"image": 0.1}, "result": result}
        output.commit(outputs=written, **entries, **unknown)


if __name__ == "__main__":
    main()
