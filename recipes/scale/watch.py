"""Run a command and watch the memory, open files and maps of all its processes.

    python recipes/scale/watch.py FOLDER -- clipcid balance --keep 0.563 --json

Every 50 ms, for each process: private anonymous memory (RssAnon: what no file and no other process shares), shared memory
without a file (RssShmem), open files, maps, and how many maps and bytes of them are of files under FOLDER. A peak between
two looks is not seen. A process is a rank, or a worker: whatever else the command has started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INTERVAL = 0.05
# The process table is looked through this seldom: it takes milliseconds.
FAMILY_INTERVAL = 0.5


@dataclasses.dataclass
class Peak:
    """The largest value of each kind that was seen; bytes, or numbers."""

    anonymous: int = 0
    shared: int = 0
    files: int = 0
    maps: int = 0
    data_maps: int = 0
    mapped: int = 0

    def take(self, other: Peak) -> None:
        """Raise each value to that of `other`."""
        for field in dataclasses.fields(Peak):
            setattr(self, field.name, max(getattr(self, field.name), getattr(other, field.name)))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a command.

    Attributes:
        seconds: From start to end, starting Python included.
        cpu: Processor time of all its processes; it varies less than `seconds` where others use the machine.
        peaks: By role: ``first`` (rank 0), ``others`` (the largest of the other ranks), ``workers`` (the largest of them).
        errors: What it wrote to stderr.
    """

    code: int
    output: str
    errors: str
    seconds: float
    cpu: float
    peaks: dict[str, Peak]


def watch(command: list[str], folder: Path, environment: dict[str, str], open_files: int) -> Outcome:
    """Run a command to its end.

    Args:
        command: What to run; torchrun's children are the ranks, and otherwise the command is one.
        folder: Maps of files under it are counted as data's.
        environment: The command's environment.
        open_files: Largest number of open files of each process, as ``ulimit -n`` sets it.
    """
    launcher = Path(command[0]).name == "torchrun"
    found: dict[int, tuple[str, Peak]] = {}
    data = f" {folder.resolve()}/"
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began, cpu_before = time.perf_counter(), cpu_of_children()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files)),
        )
        next_family = 0.0
        try:
            while process.poll() is None:
                now = time.perf_counter()
                if now >= next_family:
                    next_family = now + FAMILY_INTERVAL
                    for pid, role in name_roles(process.pid, launcher):
                        found.setdefault(pid, (role, Peak()))
                for pid, (_, peak) in found.items():
                    with contextlib.suppress(OSError):  # it has ended
                        peak.take(look(pid, data))
                time.sleep(max(0.0, INTERVAL - (time.perf_counter() - now)))
        finally:
            process.terminate()  # torchrun ends its children then
            process.wait()
        seconds = time.perf_counter() - began
        output.seek(0)
        errors.seek(0)
        peaks = {role: Peak() for role in ("first", "others", "workers")}
        for role, peak in found.values():
            peaks[role].take(peak)
        cpu = cpu_of_children() - cpu_before
        return Outcome(process.returncode, output.read(), errors.read(), seconds, cpu, peaks)


def cpu_of_children() -> float:
    """Return the processor time in seconds of all children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def name_roles(root: int, launcher: bool) -> Iterator[tuple[int, str]]:
    """Yield the processes of a command and their roles."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                after_name = Path("/proc", entry, "stat").read_text().rpartition(")")[2]
                children.setdefault(int(after_name.split()[1]), []).append(int(entry))
    ranks = children.get(root, []) if launcher else [root]
    for rank in ranks:
        yield rank, "first" if not launcher or read_rank(rank) == 0 else "others"
        below = list(children.get(rank, []))
        while below:
            worker = below.pop()
            yield worker, "workers"
            below.extend(children.get(worker, []))


def read_rank(pid: int) -> int:
    """Return the rank that torchrun gave a process."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc", str(pid), "environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                return int(entry[5:])
    return -1


def look(pid: int, data: str) -> Peak:
    """Look at a process once."""
    place = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
    peak = Peak(
        anonymous=kibibytes(status, "RssAnon"),
        shared=kibibytes(status, "RssShmem"),
        files=len(os.listdir(place / "fd")),
    )
    for line in (place / "maps").read_text(errors="replace").splitlines():
        peak.maps += 1
        if data in line:
            start, _, end = line.partition(" ")[0].partition("-")
            peak.data_maps += 1
            peak.mapped += int(end, 16) - int(start, 16)
    return peak


def kibibytes(status: dict[str, str], name: str) -> int:
    """Return an entry of a process's status in bytes; 0 when the process has ended."""
    return int(status[name].split()[0]) * 1024 if name in status else 0


def main() -> None:
    """Run the command of the command line; print what was seen."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    if split != 2 or len(sys.argv) == 3:
        raise SystemExit("Usage: watch.py FOLDER -- COMMAND …")
    outcome = watch(sys.argv[3:], Path(sys.argv[1]), dict(os.environ), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    sys.stderr.write(outcome.errors)
    sys.stdout.write(outcome.output)
    seen: dict[str, Any] = {role: dataclasses.asdict(peak) for role, peak in outcome.peaks.items() if peak.files}
    print(json.dumps({"seconds": round(outcome.seconds, 2), "cpu": round(outcome.cpu, 2), **seen}), file=sys.stderr)
    raise SystemExit(outcome.code)


if __name__ == "__main__":
    main()
