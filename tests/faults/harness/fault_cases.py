"""The faults: the cases of each, and what must hold after a case."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Run
from fault_child import break_clock, count_operations, pause, tell_when_ready
from fault_disks import can_mount, heed_permissions, limit_file_sizes, limit_room, set_read_only
from fault_place import Result, Site, Step, read_tree
from fault_processes import (
    list_host_kills,
    list_rank_kills,
    list_worker_kills,
    run_host_kill,
    run_rank_kill,
    run_worker_kill,
)

from clipcid_cli.formats.embeddings.manifest import all_files, read_manifest

_PAGE = 4096
_YEAR = 366 * 86400.0
_PROMPT = 10.0
"""Seconds in which a signalled run ends on a machine that does other things too."""
_INTERRUPTED = "Interrupted. Run the same command again"
_CONTINUES = f"{_INTERRUPTED} to continue "  # where it stopped, or from a step

_TIMES_OF_FILES = re.compile(
    r"(other bytes|half under its final name): .*/index/.*|"
    r"(left over|missing): [^/]+/index/\w+/matched-\w+/[\w.]*"
)
"""Caches record the times of files or are named after them; hashes are kept only of files of a certain age."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        everyday: How many cases the everyday run draws that the fault reaches.
        list_cases: All cases of a step.
        run_case: Runs one of them.
        needs_mount: Whether it takes a process that may mount disks.
    """

    name: str
    everyday: int
    list_cases: Callable[[Site, Step, random.Random], list[Any]]
    run_case: Callable[[Site, Step, Any], Result]
    needs_mount: bool = False


def killed_problems(found: Run) -> list[str]:
    """Return what a run said that must not have said anything but its progress."""
    problems = [] if found.returncode in (-9, 0) else [f"exit {found.returncode}"]
    problems += [mark for mark in ("Traceback", "bug in clipcid", "Error: ") if mark in found.stderr]
    return [f"killed: {', '.join(problems)}{found!r}"] if problems else []


def list_kills(site: Site, step: Step, chance: random.Random) -> list[tuple[int, bool]]:
    """Before and after every file operation."""
    return [(number, after) for number in range(len(site.operations[step.name])) for after in (False, True)]


def run_kill(site: Site, step: Step, case: tuple[int, bool]) -> Result:
    """Kill a run at a file operation, then give the command again."""
    found = site.run(step, functools.partial(count_operations, site.log, *case))
    problems = killed_problems(found) + site.find_half(step)
    return Result(found.returncode, problems + site.check_again(step), found.returncode == -9)


def refused_problems(site: Site, step: Step, found: Run) -> list[str]:
    """Return what is wrong with a run that could not do its work: one error, or a whole result where it could after all."""
    problems = [f"refused: {', '.join(found.problems())}{found!r}"] if found.problems() else []
    if found.returncode == 1:
        _, _, error = found.stderr.rpartition("Error: ")
        problems += [] if len(error.strip().splitlines()) >= 2 else [f"no fix: {found!r}"]
        return problems + site.find_half(step)
    return problems or site.compare(step)


def unnamed_problems(found: Run, name: str) -> list[str]:
    """Return what is wrong where an error names neither a file nor its folder; one in the place itself has no folder."""
    path = Path(name)
    named = found.returncode != 1 or any(str(part) in found.stderr for part in (path, path.parent) if part != Path())
    return [] if named or path == Path() else [f"{name} is not named{found!r}"]


def list_rooms(site: Site, step: Step, chance: random.Random) -> list[int]:
    """Free bytes from none to a little more than the outputs take."""
    if not can_mount():
        return []
    made = sum(map(len, site.expected[step.name].values())) - sum(map(len, read_tree(site.before(step)).values()))
    return [_PAGE * int(part * made / _PAGE) for part in (0, *sorted(chance.uniform(0, 1.3) for _ in range(15)))]


def run_full_disk(site: Site, step: Step, room: int) -> Result:
    """Run on a disk with little room, then give the command again with more."""
    with site.disk(step):
        limit_room(site.place, room)
        found = site.run(step)
        problems = refused_problems(site, step, found)
        limit_room(site.place, None)
        return Result(found.returncode, problems + site.check_again(step), found.returncode == 1)


def list_sizes(site: Site, step: Step, chance: random.Random) -> list[int]:
    """Limits below the sizes of the files it makes."""
    before = read_tree(site.before(step))
    sizes = [len(content) for name, content in site.expected[step.name].items() if name not in before]
    return [1, *sorted({size - 1 for size in sizes if size > 1})]


def run_limited_sizes(site: Site, step: Step, size: int) -> Result:
    """Run where no file may grow beyond a size (EFBIG, as a quota), then give the command again."""
    pipe = site.root / "pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    found = site.run(step, functools.partial(limit_file_sizes, size, pipe))
    found = dataclasses.replace(found, stderr=found.stderr + os.read(reader, 1 << 16).decode())
    os.close(reader)
    return Result(found.returncode, refused_problems(site, step, found) + site.check_again(step), found.returncode == 1)


def list_read_only(site: Site, step: Step, chance: random.Random) -> list[str]:
    """The one case."""
    return ["all"] if can_mount() else []


def run_read_only(site: Site, step: Step, case: str) -> Result:
    """Run on a read-only disk, then give the command again on one that is not."""
    with site.disk(step):
        set_read_only(site.place, True)
        found = site.run(step)
        set_read_only(site.place, False)
        return Result(
            found.returncode, refused_problems(site, step, found) + site.check_again(step), found.returncode == 1
        )


def is_told(found: Run, name: str) -> bool:
    """Tell whether a run warned that its result lacks something because of a file, and then succeeded."""
    _, warning, text = "".join(found.stderr.split()).partition("warning:Thereport")
    return found.returncode == 0 and bool(warning) and Path(name).name in text


def list_permissions(site: Site, step: Step, chance: random.Random) -> list[str]:
    """Every file and folder that is there before the step."""
    return [".", *read_tree(site.before(step))]


def run_without_permission(site: Site, step: Step, name: str) -> Result:
    """Run where a file may not be read, or a folder not be written to, then give the command again."""
    path = site.place / name
    mode = path.stat().st_mode
    path.chmod(0o555 if path.is_dir() else 0)
    found = site.run(step, heed_permissions)
    path.chmod(mode)
    return judge_unusable(site, step, found, name)


def judge_unusable(site: Site, step: Step, found: Run, name: str) -> Result:
    """Judge a run that could not use a file, and give the command again with the file in order."""
    told = is_told(found, name)
    problems = found.problems() if told else refused_problems(site, step, found) + unnamed_problems(found, name)
    return Result(found.returncode, problems + site.check_again(step), told or found.returncode == 1)


def list_recorded(site: Site, step: Step, chance: random.Random) -> list[str]:
    """Every file that an earlier step wrote and recorded the hash of."""
    work, found = site.before(step) / "clipcid-work", list[Path]()
    for sidecar in work.rglob("*.json"):
        entries = json.loads(sidecar.read_text()).get("outputs", [])
        found += [sidecar.parent / entry["path"] for entry in entries]
    for manifest in work.rglob("manifest.parquet"):
        found += [manifest.parent / each.path for each in all_files(read_manifest(manifest.parent, ""))]
    # Of an index, each copy of the place makes its own: it knows data files by inode and times. Its tests damage it.
    return sorted({os.path.relpath(path, site.before(step)) for path in found if "index" not in path.parts})


def run_replaced(site: Site, step: Step, name: str) -> Result:
    """Run with another file of the same size in a file's place, then give the command again with the right one."""
    path, content = site.place / name, bytearray((site.place / name).read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    found = site.run(step)
    shutil.copy2(site.before(step) / name, path)
    return judge_unusable(site, step, found, name)


def list_outputs(site: Site, step: Step, chance: random.Random) -> list[str]:
    """Every file that the step makes."""
    before = read_tree(site.before(step))
    return [name for name in site.expected[step.name] if name not in before and not name.endswith("/")]


def run_folder_in_place(site: Site, step: Step, name: str) -> Result:
    """Run with a folder where an output belongs, then give the command again without it."""
    path = site.place / name
    path.mkdir(parents=True)
    found = site.run(step)
    problems = refused_problems(site, step, found) + unnamed_problems(found, name)
    if path.is_dir():
        path.rmdir()
    return Result(found.returncode, problems + site.check_again(step), found.returncode == 1)


def list_moments(site: Site, step: Step, chance: random.Random) -> list[tuple[int, float]]:
    """Both signals at moments of a run, as parts of its time."""
    return [(number, chance.random()) for number in (signal.SIGINT, signal.SIGTERM) for _ in range(20)]


def run_signal(site: Site, step: Step, case: tuple[int, float]) -> Result:
    """Send a signal, then give the command again."""
    number, part = case
    ready = site.root / "ready"
    ready.unlink(missing_ok=True)
    started = site.start(step, functools.partial(tell_when_ready, ready))
    while not ready.exists() and started.poll() is None:
        time.sleep(0.002)
    time.sleep(part * site.seconds[step.name])
    started.send_signal(number)
    began = time.monotonic()
    found = site.finish(step, started)
    problems = []
    if found.returncode not in (0, 128 + number):
        problems.append(f"exit {found.returncode}{found!r}")
    said = f"{_INTERRUPTED}." if step.name == "export" else _CONTINUES  # an export begins anew
    # A line of progress may still come before the end.
    if found.returncode and not any(line.startswith(said) for line in found.stderr.splitlines()):
        problems.append(f"it did not say that it was interrupted{found!r}")
    problems += [f"{mark}{found!r}" for mark in ("Traceback", "bug in clipcid", "Error: ") if mark in found.stderr]
    if time.monotonic() - began > _PROMPT:
        problems.append(f"it took {time.monotonic() - began:.1f} s to end")
    problems += site.find_half(step) + site.check_again(step)
    return Result(found.returncode, problems, found.returncode != 0)


def list_clocks(site: Site, step: Step, chance: random.Random) -> list[tuple[int, float, float, float]]:
    """At an operation; the clock's offset before the kill, its drift, and its offset after."""
    count = len(site.operations[step.name])
    wrong = ((_YEAR, 0, -_YEAR), (-_YEAR, 0, _YEAR), (0, -10, -_YEAR), (-50 * _YEAR, 0, 0))
    return [(chance.randrange(count), *clocks) for clocks in wrong]


def run_wrong_clock(site: Site, step: Step, case: tuple[int, float, float, float]) -> Result:
    """Kill a run whose clock is wrong, and give the command again under another wrong clock; all files are of the future."""
    number, offset, drift, later = case
    for path in site.place.rglob("*"):
        os.utime(path, (time.time() + _YEAR,) * 2)
    found = site.run(step, functools.partial(break_clock, offset, drift, site.log, number))
    problems = killed_problems(found) + site.find_half(step)
    problems += site.check_again(step, functools.partial(break_clock, later, -0.5, site.log))
    problems = [text for text in problems if not _TIMES_OF_FILES.fullmatch(text)]
    return Result(found.returncode, problems, found.returncode == -9)


def run_delayed(site: Site, step: Step, number: int) -> Result:
    """Start a second run while the first one is slow at a file operation; then give the command again."""
    mark = site.root / "reached"
    mark.unlink(missing_ok=True)
    act = functools.partial(pause, mark, 2 * site.seconds[step.name] + 0.5)
    first = site.start(step, functools.partial(count_operations, site.log, number, act=act))
    while not mark.exists() and first.poll() is None:
        time.sleep(0.002)
    reached = mark.exists()
    found = [site.run(step), site.finish(step, first, site.patience(step))]
    problems = []
    for outcome in found:
        if outcome.problems() or (outcome.returncode == 1 and "Another run" not in outcome.stderr):
            problems.append(f"{outcome.problems()}{outcome!r}")
    if all(outcome.returncode for outcome in found):
        problems.append(f"neither of the two runs succeeded{found!r}")
    return Result(found[0].returncode, problems + site.check_again(step), reached)


def list_operations(site: Site, step: Step, chance: random.Random) -> list[int]:
    """A part of the file operations."""
    count = len(site.operations[step.name])
    return sorted(chance.sample(range(count), min(15, count)))


FAULTS = (
    Fault("killed", 9, list_kills, run_kill),
    Fault("full disk", 1, list_rooms, run_full_disk, needs_mount=True),
    Fault("limit of file sizes", 1, list_sizes, run_limited_sizes),
    Fault("read-only disk", 1, list_read_only, run_read_only, needs_mount=True),
    Fault("no permission", 1, list_permissions, run_without_permission),
    Fault("a file of an earlier step replaced", 1, list_recorded, run_replaced),
    Fault("a folder in an output's place", 1, list_outputs, run_folder_in_place),
    Fault("Ctrl-C, SIGTERM", 1, list_moments, run_signal),
    Fault("two runs at once", 1, list_operations, run_delayed),
    Fault("clock set back", 1, list_clocks, run_wrong_clock),
    Fault("one of two ranks killed", 1, list_rank_kills, run_rank_kill),
    Fault("one of two hosts killed", 0, list_host_kills, run_host_kill),
    Fault("a decoding process killed", 0, list_worker_kills, run_worker_kill),
)
