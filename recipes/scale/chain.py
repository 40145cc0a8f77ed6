"""Run every step at several sizes and with several numbers of processes; print what it took and what a row costs.

    python recipes/scale/chain.py                               250k and 1M pairs, 1 and 2 processes
    python recipes/scale/chain.py --sizes 4M 16M --processes 1
    python recipes/scale/chain.py --many-shards                 500,000 pairs in 50,000 shards
    python recipes/scale/chain.py --sizes 100k --only embed balance

For each size and number of processes a work directory is made anew, and the real commands are run in it one after another,
each under watch.py and with as many open files as Linux allows by default, 1,024. What a step costs is a line in the log
(`log.jsonl` in --scratch) and in the table printed at its end; from the two largest sizes table.py takes the slope.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_data import make_data, parse_count
from make_embeddings import embed_flags, write_embeddings
from table import print_run, print_slopes
from tiny_teacher import write_teacher
from watch import Outcome, watch

import clipcid_cli

HERE = Path(__file__).parent
STEPS = ("embed", "balance", "cluster", "distill")


@dataclasses.dataclass(frozen=True)
class Command:
    """One step.

    Attributes:
        step: One of STEPS.
        name: Its name in the table.
        program: What Python is to run.
    """

    step: str
    name: str
    program: list[str]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one size is run with one number of processes.

    Attributes:
        data: Folder of the shards.
        work: The work directory.
        side: The work directory of the exact search, which shares the embeddings.
    """

    data: Path
    teacher: Path
    work: Path
    side: Path


def main() -> None:
    """Run all, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=parse_count, nargs="+", default=[250_000, 1_000_000], help="numbers of pairs")
    parser.add_argument("--shard-size", type=parse_count, default=10_000, help="pairs a shard; LAION400M has 9,756")
    parser.add_argument("--many-shards", action="store_true", help="500,000 pairs, 10 a shard: open files and maps")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="steps to run; they need those before")
    parser.add_argument("--width", type=int, default=16, help="width of the embeddings")
    parser.add_argument("--rows", choices=["clustered", "random"], default="clustered", help="how they are distributed")
    parser.add_argument(
        "--exact-limit", type=parse_count, default=1_000_000, help="most rows to compare with all others"
    )
    parser.add_argument("--num-clusters", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=1, help="processes that read, for each process")
    parser.add_argument("--open-files", type=int, default=1024, help="most open files of a process (ulimit -n)")
    parser.add_argument("--scratch", type=Path, default=Path(os.environ.get("CLIPCID_SCALE", "/tmp/clipcid-scale")))
    parser.add_argument("--keep", action="store_true", help="leave data and work directories in --scratch")
    arguments = parser.parse_args()
    if arguments.many_shards:
        arguments.sizes, arguments.shard_size, arguments.processes = [500_000], 10, [1]
    context = describe_machine() | {"width": arguments.width, "rows": arguments.rows}
    print(f"{context['processor']}, {context['cores']} cores; clipcid {context['commit']}; {arguments.rows} rows of width "
          f"{arguments.width}; at most {arguments.open_files:,} open files", flush=True)  # fmt: skip
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    teacher = write_teacher(arguments.scratch / f"teacher-{arguments.width}", arguments.width)
    runs: list[dict[str, Any]] = []
    for pairs in arguments.sizes:
        data = arguments.scratch / f"data-{pairs}-{arguments.shard_size}"
        make_data(data, pairs, pairs // arguments.shard_size)
        for processes in arguments.processes:
            work = arguments.scratch / f"work-{pairs}-{arguments.shard_size}-{processes}"
            place = Place(data, teacher, work, work / "exact")
            for taken in run_chain(place, pairs, processes, arguments):
                runs.append(context | taken)
                print_run(runs[-1])
                with (arguments.scratch / "log.jsonl").open("a") as log:
                    log.write(json.dumps(runs[-1]) + "\n")
            if not arguments.keep:
                shutil.rmtree(work)
        if not arguments.keep:
            shutil.rmtree(data)
    print_slopes(runs)
    sys.exit(any(taken["exit"] for taken in runs))


def run_chain(place: Place, pairs: int, processes: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the steps in a fresh work directory; yield what each took."""
    shutil.rmtree(place.work, ignore_errors=True)
    began = time.perf_counter()
    write_embeddings(place.work, place.data, place.teacher, arguments.rows, left=processes, seed=0)
    print(f"{pairs:,} rows written in {time.perf_counter() - began:.1f} s", flush=True)
    for command in list_commands(place, pairs, arguments):
        if command.step not in arguments.only and command.step != "embed":
            continue
        outcome = run(command.program, place, processes, arguments)
        answer = json.loads(outcome.output) if outcome.code == 0 else {}
        yield {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "step": command.name,
            "pairs": pairs,
            "shards": pairs // arguments.shard_size,
            "processes": processes,
            "exit": outcome.code,
            "error": "" if outcome.code == 0 else outcome.errors[:4000],
            "wall": round(outcome.seconds, 2),
            "cpu": round(outcome.cpu, 2),
            # Embeddings that are there already answer with the times of their making.
            "seconds": {} if command.name == "embed again" else answer.get("seconds", {}),
            "images": answer.get("images", answer.get("samples")),
            "peaks": {role: dataclasses.asdict(peak) for role, peak in outcome.peaks.items() if peak.files},
            "disk": measure_disk(place.work),
        }


def list_commands(place: Place, pairs: int, arguments: argparse.Namespace) -> Iterator[Command]:
    """Yield the steps in order."""

    def clipcid(name: str, *flags: str, work: Path = place.work) -> Command:
        step = name.split()[0]
        program = ["-m", "clipcid_cli", step, *flags, "--work", str(work), "--quiet", "--json"]
        return Command(step, name, program)

    workers = ["--workers", str(arguments.workers)]
    index = [str(HERE / "make_index.py"), str(place.data), str(place.work), *workers]
    yield Command("embed", "index", index)
    embed = [str(place.data), *embed_flags(place.teacher), *workers]
    yield clipcid("embed", *embed)
    yield clipcid("embed again", *embed)
    if pairs <= arguments.exact_limit:
        embeddings = next((place.work / "embeddings").iterdir())
        yield clipcid("balance exact", "--keep", "0.563", "--embeddings", str(embeddings), work=place.side)
    yield clipcid("balance partitioned", "--keep", "0.563", "--neighbors", "partitioned")
    # As many centroids and iterations at every size, so that cost is one a row; real ones grow with N.
    yield clipcid("cluster", "--num-clusters", str(arguments.num_clusters), "--iterations", "3")
    distill = ["--teacher", str(place.teacher), "--student", str(HERE / "student.json"), "--steps", "5", *workers]
    yield clipcid("distill clip-kd", *distill, "--preset", "clip-kd", "--keep-list", "none")
    yield clipcid("distill cid", *distill, "--preset", "cid")
    yield clipcid("distill again", *distill, "--preset", "cid", "--name", "again")


def run(program: list[str], place: Place, processes: int, arguments: argparse.Namespace) -> Outcome:
    """Run a program with some processes, watched."""
    launcher = [sys.executable]
    if processes > 1:
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        launcher = [torchrun, "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    threads = max(1, (os.cpu_count() or 1) // processes)
    # The package that is installed, not one that lies in the current folder.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    environment.pop("CLIPCID_WORK", None)
    return watch([*launcher, *program], place.work.parent, environment, arguments.open_files)


def measure_disk(work: Path) -> int:
    """Return the bytes of all files in a work directory but embeddings and runs of distill."""
    total = 0
    for folder, inner, files in os.walk(work):
        inner[:] = [name for name in inner if name not in ("img_emb", "text_emb", "metadata", "distill", "example")]
        total += sum(os.lstat(os.path.join(folder, name)).st_size for name in files)
    return total


def describe_machine() -> dict[str, Any]:
    """Name the processor, the libraries and the commit."""
    import torch

    package = Path(clipcid_cli.__file__).parent
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=package, capture_output=True, text=True)
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
