"""Is this checkout as fast as another one? The same commands from both, in turn, on this machine.

    git worktree add ../before COMMIT
    python recipes/benchmarks/two_checkouts.py ../before                       all cases, three rounds: half an hour
    python recipes/benchmarks/two_checkouts.py ../before --only starts embed --rounds 5

Both run with this environment's packages; each takes the code of its own checkout. Printed are medians, and the ratio
of the two pair by pair: above 1 this checkout takes longer. Quote it only from a machine where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from balance import describe_machine

HERE = Path(__file__).parents[2]
SHIPPED = HERE / "recipes" / "quickstart"
COMMANDS = ("embed", "balance", "cluster", "distill", "eval-zeroshot", "eval-linear", "export")
PLAIN = ("--device", "cpu", "--precision", "fp32")


def write_rows(folder: Path, rows: int, width: int, groups: int = 0) -> Path:
    """Write unit rows as another tool would, float16 [rows, width], around `groups` centers or none."""
    random = np.random.default_rng(0)
    found = random.normal(size=(rows, width)).astype(np.float32)
    if groups:
        centers = random.normal(size=(groups, width)).astype(np.float32)
        found = centers[random.integers(groups, size=rows)] + random.random((rows, 1), np.float32) * found
    (folder / "img_emb").mkdir(parents=True)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    np.save(folder / "img_emb" / "img_emb_0.npy", found.astype(np.float16))
    return folder


def prepare(place: Path, cases: Sequence[str]) -> None:
    """Write what the chosen cases read."""
    if {"balance", "threshold"} & set(cases):
        write_rows(place / "grouped", 50_000, 512, groups=12_500)
    if "kmeans" in cases:
        write_rows(place / "kmeans", 60_000, 512, groups=2_048)
    if "assign" in cases:
        write_rows(place / "random", 200_000, 192)
    if "shards" in cases:
        (place / "shards" / "img_emb").mkdir(parents=True)
        row = np.random.default_rng(0).normal(size=(10, 64))
        for number in range(5_000):
            unit = row / np.linalg.norm(row, axis=1, keepdims=True)
            np.save(place / "shards" / "img_emb" / f"img_emb_{number}.npy", unit.astype(np.float16))


Case = tuple[Sequence[object], Callable[[dict[str, Any], float], float]]


def wall(result: dict[str, Any], seconds: float) -> float:
    """Return the time of the whole command."""
    return seconds


def phase(name: str) -> Callable[[dict[str, Any], float], float]:
    """Read the seconds of a phase of the command."""
    return lambda result, seconds: float(result["seconds"][name])


def cases_of(place: Path) -> dict[str, Case]:
    """Return the command of each case, and what to read of its answer."""
    balance = ("balance", "--embeddings", place / "grouped", "--device", "cpu")
    cluster = ("cluster", "--keep-list", "none", "--device", "cpu", "--embeddings")
    distill = ("distill", SHIPPED / "data" / "pairs", "--student", SHIPPED / "student.json", "--preset", "clip", *PLAIN)
    return {
        **{f"start of {name}": ((name, "--help"), wall) for name in COMMANDS},
        "embed": (("embed", SHIPPED / "data" / "pairs", "--model", SHIPPED / "teacher", *PLAIN), wall),
        "embed, nothing to do": (("embed", SHIPPED / "data" / "pairs", "--model", SHIPPED / "teacher", *PLAIN), wall),
        **{
            f"balance --keep {keep}, search": ((*balance, "--keep", keep), phase("search"))
            for keep in (0.9, 0.8, 0.563)
        },
        "balance --keep 0.563": ((*balance, "--keep", 0.563), wall),
        "kmeans": ((*cluster, place / "kmeans", "--num-clusters", 2_048), phase("kmeans")),
        "assign, the whole command": (
            (*cluster, place / "random", "--num-clusters", 1_024, "--iterations", 3),
            wall,
        ),
        "shards, 5,000 of another tool": ((*balance[:1], "--embeddings", place / "shards", "--threshold", 0.0), wall),
        "shards again": ((*balance[:1], "--embeddings", place / "shards", "--threshold", 0.0), wall),
        "distill, 200 steps": ((*distill, "--steps", 200, "--batch-size", 64, "--workers", 0), wall),
    }


def run(checkout: Path, work: Path, command: Sequence[object]) -> tuple[dict[str, Any], float]:
    """Run a command of a checkout; return its JSON object, empty for a help page, and its seconds."""
    words = [sys.executable, "-m", "clipcid_cli", *map(str, command)]
    if "--help" not in words:
        words += ["--work", str(work), "--json", "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "GOMP_SPINCOUNT": "0"}
    started = time.perf_counter()
    done = subprocess.run(words, cwd=work.parent, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(words)} ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout) if "--json" in words else {}, seconds


def main() -> None:
    """Run the cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose name begins with one of these words")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    checkouts = (arguments.before.resolve(), HERE)
    print(describe_machine(os.cpu_count() or 1))
    print(f"{'case':<38} {'before':>8} {'now':>8} {'now/before':>10}   (median of {arguments.rounds})")
    with tempfile.TemporaryDirectory(prefix="two-checkouts-") as name:
        place = Path(name)
        cases = {
            case: value
            for case, value in cases_of(place).items()
            if arguments.only is None or case.startswith(tuple(arguments.only))
        }
        prepare(place, [case.split()[0].strip(",") for case in cases])
        for case, (command, read) in cases.items():
            times: list[tuple[float, ...]] = []
            for _ in range(arguments.rounds):
                pair = []
                for side, checkout in enumerate(checkouts):
                    work = place / f"work-{side}"
                    # "again" and "nothing to do" are given the same command's own result.
                    if not case.endswith(("again", "nothing to do")) or not work.exists():
                        shutil.rmtree(work, ignore_errors=True)
                    pair.append(read(*run(checkout, work, command)))
                times.append(tuple(pair))
            before, now = (median(column) for column in zip(*times, strict=True))
            ratio = median(after / first for first, after in times)
            print(f"{case:<38} {before:>7.2f}s {now:>7.2f}s {ratio:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
