"""Is `eval-zeroshot` as right as CLIP_benchmark, and faster? The same model folder and the same data through both.

    python recipes/benchmarks/zeroshot.py                      the shipped teacher, 5,548 shipped images, 5 rounds, 5 minutes
    python recipes/benchmarks/zeroshot.py --peer /path/venv    a venv that has clip-benchmark 1.6.2 and NumPy 2.3.5 already
    python recipes/benchmarks/zeroshot.py --data DIR --model DIR --batch-size 64

Without --peer a venv is made (pip, some minutes, with this environment's versions of torch, open_clip and Pillow). The data
is a CLIP_benchmark folder made of the shipped training pairs, whose classes the metadata tells; bytes of images are copied.

Whole commands are timed, start to exit, in turn: A B C A B C … Medians are printed. CLIP_benchmark runs in fp32 (--no_amp),
as evaluation does here, at each number of workers named with --workers, and once as it is by default (mixed precision, whose
metrics may differ).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from balance import describe_machine

SHIPPED = Path(__file__).parents[1] / "quickstart"
PEER = ("clip-benchmark==1.6.2", "numpy==2.3.5", "requests")
EQUAL = ("acc1", "acc5", "mean_per_class_recall")


def main() -> None:
    """Print both sides, the ratio, and whether the metrics and the table of results agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="venv with CLIP_benchmark")
    parser.add_argument("--data", type=Path, help="CLIP_benchmark folder with a test split")
    parser.add_argument("--model", type=Path, default=SHIPPED / "teacher", help="open_clip folder")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 4], help="CLIP_benchmark's and, in turn, clipcid's"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(describe_machine(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as scratch:
        peer = arguments.peer or make_peer(Path(scratch) / "venv")
        data = arguments.data or make_data(Path(scratch) / "emoji")
        bench = Bench(
            peer.resolve() / "bin", data.resolve(), arguments.model.resolve(), arguments.batch_size, Path(scratch)
        )
        compare(bench, arguments.workers, arguments.rounds)


class Bench:
    """Both commands on one model and data set."""

    def __init__(self, peer: Path, data: Path, model: Path, batch_size: int, scratch: Path) -> None:
        self.peer, self.data, self.model, self.batch_size, self.scratch = peer, data, model, batch_size, scratch
        self.output, self.work = scratch / "peer.json", scratch / "work"

    def run_peer(self, *options: str) -> tuple[float, dict[str, Any]]:
        """Run CLIP_benchmark's own program; seconds and its JSON."""
        command = [
            self.peer / "clip_benchmark", "eval", "--dataset", f"wds/{self.data.name}", "--dataset_root", self.data,
            "--model", f"local-dir:{self.model}", "--pretrained", "", "--batch_size", self.batch_size,
            "--output", self.output, *options,
        ]  # fmt: skip
        seconds = timed(command, self.scratch)
        return seconds, json.loads(self.output.read_text())

    def run_clipcid(self, *options: str) -> tuple[float, dict[str, Any]]:
        """Run clipcid; seconds and its JSON. What an earlier round measured is removed first."""
        shutil.rmtree(self.work, ignore_errors=True)
        command = [
            Path(sys.executable).with_name("clipcid"), "eval-zeroshot", self.model, self.data, "--work", self.work,
            "--batch-size", self.batch_size, "--quiet", *options,
        ]  # fmt: skip
        seconds = timed(command, self.scratch)
        (path,) = (self.work / "eval").glob("*.json")
        return seconds, json.loads(path.read_text())

    def build(self) -> str:
        """Let `clip_benchmark build` make a table of clipcid's folder of metrics and its own file; return the table."""
        table = self.scratch / "benchmark.csv"
        timed([self.peer / "clip_benchmark", "build", self.work / "eval", self.output, "--output", table], self.scratch)
        return table.read_text()


def compare(bench: Bench, workers: list[int], rounds: int) -> None:
    """Time every form in turn and print medians, ratios and agreement."""
    forms: dict[str, Callable[[], tuple[float, dict[str, Any]]]] = {}
    for number in workers:
        options = ("--no_amp", "--num_workers", str(number))
        forms[f"CLIP_benchmark, {number} workers"] = lambda options=options: bench.run_peer(*options)
    forms["CLIP_benchmark, its defaults"] = bench.run_peer
    for number in workers:
        forms[f"clipcid, {number} workers"] = lambda number=number: bench.run_clipcid("--workers", str(number))
    forms["clipcid"] = bench.run_clipcid
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    records: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, form in forms.items():
            took, records[name] = form()
            seconds[name].append(took)
    own = median(seconds["clipcid"])
    for name, times in seconds.items():
        metrics = "  ".join(f"{key} {records[name]['metrics'][key]:.6f}" for key in EQUAL)
        spread = f"({min(times):.2f} … {max(times):.2f})"
        print(f"{name:>28}: {median(times):6.2f} s {spread}, {median(times) / own:.2f} ×  {metrics}")
    reference = records[f"CLIP_benchmark, {workers[0]} workers"]["metrics"]
    for name in (name for name in records if "defaults" not in name):
        for key in EQUAL:
            difference = abs(records[name]["metrics"][key] - reference[key])
            if difference > 1e-6:
                raise SystemExit(f"{key} of {name} differs by {difference:.1e} from CLIP_benchmark's; 1e-6 is allowed.")
    best = min(
        median(seconds[name]) for name in seconds if name.startswith("CLIP_benchmark, ") and "defaults" not in name
    )
    print(f"checked: {', '.join(EQUAL)} agree to 1e-6 in fp32")
    print(f"clipcid is {best / own:.2f} times as fast as the fastest fp32 form of CLIP_benchmark")
    table = bench.build().splitlines()
    if len(table) != 3:
        raise SystemExit(f"clip_benchmark build made {len(table) - 1} rows of two files:\n" + "\n".join(table))
    print(
        f"clip_benchmark build read both files: {len(table) - 1} rows, columns {', '.join(sorted(table[0].split(',')))}"
    )


def timed(command: list[Any], folder: Path) -> float:
    """Run a command offline and in silence; seconds from start to exit."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "GOMP_SPINCOUNT"}}
    if "clipcid" in str(command[0]):
        environment = dict(os.environ)
    started = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return seconds


def make_peer(folder: Path) -> Path:
    """Make a venv with CLIP_benchmark and this environment's torch, torchvision, open_clip and Pillow."""
    same = [f"{name}=={version(name)}" for name in ("torch", "torchvision", "open_clip_torch", "pillow")]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *PEER, *same], check=True)
    return folder


def make_data(folder: Path) -> Path:
    """Write the shipped pairs that have a class as a CLIP_benchmark folder."""
    classes = tomllib.loads((SHIPPED / "data" / "classes.toml").read_text(encoding="utf-8"))
    label_of = {part: label for label, parts in enumerate(classes.values()) for part in parts}
    shards = sorted((SHIPPED / "data" / "pairs").glob("*.tar"))
    (folder / "test").mkdir(parents=True)
    count = 0
    for number, shard in enumerate(shards):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as source:
            for member in source:
                key, _, suffix = member.name.partition(".")
                content = source.extractfile(member)
                assert content is not None
                samples.setdefault(key, {})[suffix] = content.read()
        with tarfile.open(folder / "test" / f"{number}.tar", "w") as target:
            for key, files in samples.items():
                label = label_of.get(json.loads(files["json"])["subcategory"])
                if label is not None:
                    add_member(target, f"{key}.webp", files["webp"])
                    add_member(target, f"{key}.cls", str(label).encode())
                    count += 1
    (folder / "test" / "nshards.txt").write_text(str(len(shards)))
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(SHIPPED / "data" / "classification" / name, folder / name)
    print(f"{count:,} shipped images, {len(classes)} classes, {len(shards)} shards")
    return folder


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one file to a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    archive.addfile(header, io.BytesIO(data))


if __name__ == "__main__":
    main()
