"""What does `balance` take where a fifth of the rows is new? Beside a search from nothing, and are the bytes the same?

    python recipes/benchmarks/grown.py                    1,000,000 rows of width 64: half an hour on 2 cores
    python recipes/benchmarks/grown.py --rows 200000

Embeddings in shards of 5,000 rows are balanced without their last shards (not counted), then with them, and all of them in
a fresh work directory: the real command, at one threshold. Printed: processor time (of all threads) and wall-clock time of
both commands, their ratio, and whether keep list, forest, sets and curve are the same bytes. Where other programs run, only
processor time means something.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from balance import describe_machine, unit

SHARD_ROWS = 5_000
FILES = ("keep.parquet", "forest.parquet", "sets.parquet", "curve.csv")


def main() -> None:
    """Print both times, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--new", type=float, default=0.2, help="share of the rows that is new")
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    shards = arguments.rows // SHARD_ROWS
    if shards < 2:
        parser.error(f"--rows {arguments.rows}: at least {2 * SHARD_ROWS}, two shards")
    new = round(arguments.new * shards)
    pairs = arguments.rows * (arguments.rows - 1) // 2
    old_rows = (shards - new) * SHARD_ROWS
    print(describe_machine(arguments.threads))
    print(
        f"{arguments.rows:,} rows of width {arguments.width} in {shards:,} files, {new * SHARD_ROWS:,} of them new, "
        f"threshold {arguments.threshold:g}: {1 - old_rows * (old_rows - 1) / 2 / pairs:.1%} of all pairs have a new row"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_shards(folder, shards, new, arguments.width)
        balance(folder, "grown", arguments)
        for path in (folder / "later").iterdir():
            path.rename(folder / "embeddings" / "img_emb" / path.name)
        grown, whole = balance(folder, "grown", arguments), balance(folder, "whole", arguments)
        equal = [read(folder / "grown", name) == read(folder / "whole", name) for name in FILES]
        size = (folder / "whole" / "balance" / "forest.parquet").stat().st_size
    for name, (cpu, wall) in (("grown", grown), ("from nothing", whole)):
        print(f"{name:>14}: {cpu:8.1f} CPU s, {wall:8.1f} s")
    print(f"{'ratio':>14}: {grown[0] / whole[0]:8.3f} of CPU, {grown[1] / whole[1]:8.3f}")
    print(
        f"{', '.join(FILES)}: {'the same bytes' if all(equal) else f'differ: {equal}'}; the forest has {size:,} bytes"
    )


def write_shards(folder: Path, shards: int, new: int, width: int) -> None:
    """Write rows around N/4 centres, as embeddings of another tool; the new shards beside them."""
    generator = np.random.default_rng(0)
    for name in ("embeddings/img_emb", "later"):
        (folder / name).mkdir(parents=True)
    centres = unit(generator.standard_normal((shards * SHARD_ROWS // 4, width), dtype=np.float32))
    for number in range(shards):
        near = centres[generator.integers(len(centres), size=SHARD_ROWS)]
        spread = generator.uniform(0.02, 0.6, size=(SHARD_ROWS, 1)).astype(np.float32) / width**0.5
        rows = unit(near + spread * generator.standard_normal(near.shape, dtype=np.float32))
        place = folder / ("embeddings/img_emb" if number < shards - new else "later")
        np.save(place / f"img_emb_{number:04d}.npy", rows.astype(np.float16))


def balance(folder: Path, work: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Run the command; return its processor time and its wall-clock time in seconds."""
    command = [
        "clipcid",
        "balance",
        "--embeddings",
        str(folder / "embeddings"),
        "--work",
        str(folder / work),
        "--quiet",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "GOMP_SPINCOUNT": "0"}
    began = time.perf_counter()
    with subprocess.Popen([*command, "--threshold", str(arguments.threshold)], env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began


def read(work: Path, name: str) -> bytes:
    """Read an output."""
    return (work / "balance" / name).read_bytes()


if __name__ == "__main__":
    main()
