"""The steps that the harness disturbs, the folder they run in, and what that folder holds in the end."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import forks
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import Run, write_inputs
from fault_child import count_operations, read_operations
from fault_disks import own_disk


@dataclasses.dataclass(frozen=True)
class Step:
    """A command that is disturbed.

    Attributes:
        name: Its column in tests/faults/RESULTS.md.
        after: The step whose place it starts in; None: the data and a model alone.
    """

    name: str
    command: tuple[str, ...]
    after: str | None = None


_SHORT = ("--preset", "cid", "--steps", "3", "--batch-size", "4")
_DISTILL = ("distill", "--student", "student.json", "--name", "run", *_SHORT)
STEPS = (
    Step("embed", ("embed", "data", "--model", "model", "--batch-size", "8")),
    Step("balance", ("balance", "--keep", "0.7"), "embed"),
    Step("balance, partitioned", ("balance", "--keep", "0.7", "--neighbors", "partitioned"), "embed"),
    Step("balance, new shards", ("balance", "--keep", "0.7", "--write-shards", "made"), "balance"),
    Step("cluster", ("cluster", "--num-clusters", "3", "--iterations", "2"), "balance"),
    Step("distill", (*_DISTILL, "--checkpoint-every", "1", "--val-fraction", "0.2"), "cluster"),
    Step("eval-zeroshot", ("eval-zeroshot", "model", "classified", "--predictions")),
    Step("eval-linear", ("eval-linear", "model", "--train", "classified", "--test", "classified")),
    Step("export", ("export", "model", "--format", "open-clip", "--format", "hf", "--out", "out")),
)

Tree = dict[str, bytes]
Hook = Callable[[], None]


class Result(NamedTuple):
    """What a case gave.

    Attributes:
        code: Exit code of the disturbed run.
        problems: What breaks the rules.
        reached: Whether the fault took effect; only such a case counts.
    """

    code: int | None
    problems: list[str]
    reached: bool


class Site:
    """A folder in which steps run one at a time, always under the same path, so that equal runs leave equal bytes.

    Attributes:
        place: Where they run.
        log: Where a disturbed run logs its file operations.
        expected: By step, what an undisturbed run leaves.
        operations: By step, the file operations of an undisturbed run.
        seconds: By step, how long it takes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = root / "place"
        self.log = root / "operations"
        self.expected: dict[str, Tree] = {}
        self.operations: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    def prepare(self) -> None:
        """Write the data and a model, and run every step undisturbed."""
        write_inputs(self.root / "before-None")
        for step in STEPS:
            self.reset(step)
            began = time.monotonic()
            found = self.run(step, functools.partial(count_operations, self.log))
            self.seconds[step.name] = time.monotonic() - began
            assert found.returncode == 0, found
            self.operations[step.name] = read_operations(self.log)
            self.expected[step.name] = read_tree(self.place)
            shutil.copytree(self.place, self.root / f"before-{step.name}", symlinks=True)

    def reset(self, step: Step) -> None:
        """Make the place that of the moment before a step."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.fill(step)

    def fill(self, step: Step) -> None:
        """Copy what there is before a step into the place."""
        shutil.copytree(self.before(step), self.place, symlinks=True, dirs_exist_ok=True)

    def start(self, step: Step, hook: Hook | None = None, **environment: str) -> forks.Started:
        """Start a step in the place; the hook puts a fault in."""
        everywhere = forks.clean_environment() | {"CLIPCID_WORKERS": "0", "CLIPCID_DEVICE": "cpu"}
        return forks.start(step.command, self.place, everywhere | environment, hook=hook)

    def finish(self, step: Step, started: forks.Started, more: float = 0.0) -> Run:
        """Wait for the end of a step; one that takes much longer than it should hangs, which is no exit code."""
        try:
            code = started.wait(self.patience(step) + more)
        except subprocess.TimeoutExpired:
            code = None
        return Run(step.command, self.place, code, *started.read())

    def run(self, step: Step, hook: Hook | None = None) -> Run:
        """Run a step in the place to its end."""
        return self.finish(step, self.start(step, hook))

    def patience(self, step: Step) -> float:
        """Return the seconds after which a step is said to hang: 30, more where the machine is busy or at first."""
        return max(30.0, 15 * self.seconds.get(step.name, 20.0))

    def before(self, step: Step) -> Path:
        """Return the folder that the place is a copy of before a step."""
        return self.root / f"before-{step.after}"

    @contextmanager
    def disk(self, step: Step) -> Iterator[None]:
        """Give the place a disk of its own for the time of a case."""
        shutil.rmtree(self.place)
        with own_disk(self.place):
            self.fill(step)
            yield

    def check_again(self, step: Step, hook: Hook | None = None) -> list[str]:
        """Give the command once more, and return what is not as if nothing had happened."""
        found = self.run(step, hook)
        if found.returncode != 0 or found.problems():
            return [f"given again: {', '.join(found.problems())}{found!r}"]
        return self.compare(step)

    def compare(self, step: Step, expectation: str = "") -> list[str]:
        """Return the files that are not those of an undisturbed run: other bytes, missing, or left over."""
        found, expected = read_tree(self.place), self.expected[expectation or step.name]
        kinds = {name: "other bytes" if name in expected else "left over" for name in found}
        kinds |= dict.fromkeys(expected.keys() - found.keys(), "missing")
        return [f"{kind}: {name}" for name, kind in kinds.items() if found.get(name) != expected.get(name)]

    def find_half(self, step: Step, expectation: str = "") -> list[str]:
        """Return the files under final names that are neither whole nor as before the step."""
        found, expected = read_tree(self.place), self.expected[expectation or step.name]
        before = read_tree(self.before(step))
        return [
            f"half under its final name: {name}"
            for name, content in found.items()
            if name in expected and content not in (expected[name], before.get(name)) and not name.endswith(".jsonl")
        ]


# A checksum is of these, too.
_MEASURED = {"checksum", "seconds", "time", "samples_per_second", "images_per_second", "data_wait_share", "latency_ms"}
_NUMBERS = re.compile(rb"\d[\d.,]*")
_FOR_PEOPLE = (".html", ".md")  # their numbers are rounded ones of the JSON files
_MANIFEST = "manifest.parquet"  # has the times of the files that it records
# An index, and what is matched by it, know each data file by its inode and times, which every copy of the place has anew.
_INDEXED = re.compile(r"/index/")
_MATCHED = re.compile(r"/matched-[0-9a-f]+/")
_WITH_TIMES = (*_FOR_PEOPLE, ".json", ".jsonl", _MANIFEST)


def read_tree(place: Path) -> Tree:
    """Read all files and folders below a place, without what was measured: times, rates, and who held a lock."""
    tree = {}
    for path in sorted(place.rglob("*")):
        name = _MATCHED.sub("/matched/", f"{path.relative_to(place)}/").removesuffix("/")
        if path.is_dir():
            tree[name + "/"] = b""
        elif _INDEXED.search(name):
            tree[name] = _without_stamps(path)
        elif path.suffix == ".lock":
            tree[name] = b""
        else:
            tree[name] = _without_times(path)
    return tree


def _without_stamps(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        if path.suffix == ".arrow":
            return repr(pa.ipc.open_file(pa.BufferReader(content)).read_all().to_pylist()).encode()
        if path.suffix == ".parquet":
            return repr(pq.read_table(io.BytesIO(content)).num_rows).encode()
    except (pa.ArrowInvalid, OSError):  # half a file
        return content
    return b"" if path.suffix == ".json" else content


def _without_times(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(content.decode())))
        return json.dumps(_drop_measured(rows)).encode() if any(_MEASURED & row.keys() for row in rows) else content
    if path.name == _MANIFEST:
        return json.dumps(_drop_measured(pq.read_table(io.BytesIO(content)).to_pylist())).encode()
    if path.suffix in _FOR_PEOPLE:
        return _NUMBERS.sub(b"0", content)
    if path.suffix not in (".json", ".jsonl"):
        return content
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    try:
        return b"\n".join(json.dumps(_drop_measured(json.loads(line))).encode() for line in lines)
    except ValueError:
        return content


def _drop_measured(value: Any) -> Any:
    if isinstance(value, dict):
        dropped = _MEASURED
        if str(value.get("path", "")).endswith(_WITH_TIMES):  # the entry of a file with times in it
            dropped = dropped | {"size", "hash"}
        kept = {name: entry for name, entry in value.items() if name not in dropped and not name.startswith("seconds_")}
        return {name: _drop_measured(entry) for name, entry in kept.items()}
    return [_drop_measured(entry) for entry in value] if isinstance(value, list) else value
