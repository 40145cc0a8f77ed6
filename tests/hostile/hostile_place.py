"""Where hostile data is tried: a home, data and neighbours that no command may touch, and the verdict on what one did.

`Place.run` runs a command line under the spy (`spy.py`) in a fork, or in a program of its own, and `Outcome.problems` says
what is wrong with what it did: code or a process that was not typed, a file or a connection outside what was named, memory,
time, a traceback. What the spy cannot see, since a C library did it, is seen afterwards: all that a command may not touch is
compared with what it was, by names, modes, links and contents.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import forks
import pyarrow.parquet as pq
import pytest
import spy
from conftest import Run, clipcid_command, make_image

MORE_MEMORY = 2**30
"""Bytes that a process of a command may take beyond what it begins with."""

SECONDS = 30.0
"""How long a command may take; those here take one or two."""

PUBLIC = "93.184.216.34"
"""The address of a "public" server, see `Place.run`."""

# What the libraries take that a program of its own imports first; forks begin with them.
_LIBRARIES = 450 * 2**20
# Variables by which a user's cache would be elsewhere than in the home.
_OTHER_CACHES = {"CLIPCID_CACHE", "XDG_CACHE_HOME"}
_HASHED = 2**24  # of larger files, the time says whether they were changed
# Controls that a terminal obeys, and marks that turn the direction of text. Lines and tabs are no harm.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def few(count: int, cases: Iterable[Any]) -> list[Any]:
    """Return the cases of a test, of which everyday runs try the first few; the others are slow together."""
    listed = list(cases)
    return listed[:count] + [pytest.param(case, marks=pytest.mark.slow) for case in listed[count:]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a watched command did.

    Attributes:
        run: Its streams and exit code, None where it was stopped.
        events: What the spy wrote down.
        grown: The most memory that one of its processes took beyond what it began with, in bytes.
        seconds: How long it took.
        changes: What it did to the files that it may not touch.
    """

    run: Run
    events: list[dict[str, Any]]
    grown: int
    seconds: float
    changes: list[str]

    @property
    def json(self) -> Any:
        return self.run.json

    def problems(self) -> list[str]:
        """Return what no data may cause; empty where all is well."""
        refused = (event for event in self.events if event.get("refused"))
        problems = [f"{event['event']}: {event['what']}" for event in refused]
        problems += self.changes
        if self.grown > MORE_MEMORY:
            problems.append(f"took {self.grown / 2**20:,.0f} MiB more memory")
        if self.run.returncode is None:
            problems.append(f"was stopped after {self.seconds:.0f} s")
        problems += self.run.problems()
        for name, text in (("stdout", self.run.stdout), ("stderr", self.run.stderr)):
            problems += [f"{control!r} on {name}" for control in sorted(set(_CONTROLS.findall(text)))]
        return list(dict.fromkeys(problems))

    def notes(self, event: str) -> list[Any]:
        return [entry["what"] for entry in self.events if entry["event"] == event]

    def __repr__(self) -> str:
        listed = "".join(f"\n  {problem}" for problem in self.problems())
        return f"\n{self.seconds:.1f} s, {self.grown / 2**20:,.0f} MiB more{listed}{self.run!r}"


class Place:
    """A folder with a home, data, a neighbour, and a folder in which commands run; only the last one is theirs.

    Attributes:
        home: Has what attackers like to overwrite or read; `.cache` in it is the user's cache.
        data: For what strangers send.
        work: Commands run here; their work directory is `clipcid-work` in it.
        private: An image that no list or folder names.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.home, self.data, self.work = (self.root / name for name in ("home", "data", "work"))
        self._scratch = self.root / "tmp"
        for folder in (self.home / ".ssh", self.home / ".cache", self.data, self.work, self._scratch):
            folder.mkdir(parents=True)
        for name in (".bashrc", ".profile", ".gitconfig", ".ssh/authorized_keys", ".ssh/id_ed25519"):
            (self.home / name).write_text(f"# the user's own {name}\n")
        neighbour = self.root / "neighbour"
        (neighbour / "clipcid-work").mkdir(parents=True)
        (neighbour / "thesis.txt").write_text("three years of work\n")
        self.private = self.home / "private.png"
        self.private.write_bytes(make_image(4711))

    @property
    def cache(self) -> Path:
        """The user's cache of clipcid."""
        return self.home / ".cache" / "clipcid"

    def run(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
        real: bool = False,
        cwd: Path | None = None,
        commands: Sequence[str] = (),
        hosts: Sequence[str] = (),
        internet: Mapping[str, int] | None = None,
        names: Mapping[str, str] | None = None,
        umask: int = 0o022,
        file_bytes: int = 2**29,
    ) -> Outcome:
        """Run a command line of clipcid under the spy.

        Args:
            real: In a program of its own, with the libraries' imports; else in a fork.
            cwd: Where it runs; `work` if not given.
            commands: Shell commands that were typed.
            hosts: ``address:port`` of servers that were named.
            internet: Ports on this machine by ``address:port`` of the made-up internet.
            names: Addresses of the made-up internet by name.
            umask: That of the user.
            file_bytes: No file grows beyond.
        """
        log = self.root / "spied.jsonl"
        log.unlink(missing_ok=True)
        log.touch()
        cwd = cwd or self.work
        rules = spy.Rules(
            log=str(log),
            place=str(self.root),
            writable=tuple(map(str, (cwd, self.work, self._scratch, self.home / ".cache"))),
            private=tuple(map(str, (self.home / ".ssh", self.root / "neighbour", self.private))),
            commands=tuple(commands),
            hosts=tuple(hosts),
            names=dict(names or {}),
            routes=dict(internet or {}),
            umask=umask,
            file_bytes=file_bytes,
        )
        kept = {name: value for name, value in forks.clean_environment().items() if name not in _OTHER_CACHES}
        environment = kept | {
            "HOME": str(self.home),
            "TMPDIR": str(self._scratch),
            "TORCHINDUCTOR_CACHE_DIR": str(self._scratch / "torchinductor"),
            "CLIPCID_WORKERS": "0",
            **(env or {}),
        }
        before = self.look()
        words = list(map(str, arguments))
        start = self._start_real if real else self._start_fork
        started = start(words, cwd, environment, rules)
        code, seconds, grown = _follow(started, log, seconds)
        events = [json.loads(line) for line in log.read_text().splitlines()]
        run = Run(("clipcid", *words), cwd, code, *started.read())
        return Outcome(run, events, grown, seconds, _compare(before, self.look()))

    def _start_fork(self, words: list[str], cwd: Path, environment: dict[str, str], rules: spy.Rules) -> forks.Started:
        return forks.start(words, cwd, environment, hook=functools.partial(spy.watch, rules))

    def _start_real(self, words: list[str], cwd: Path, environment: dict[str, str], rules: spy.Rules) -> _Program:
        variables = {
            spy.VARIABLE: json.dumps(dataclasses.asdict(rules)),
            "PYTHONPATH": str(Path(spy.__file__).with_name("startup")),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return _Program([*clipcid_command(), *words], cwd, environment | variables, self.root)

    def look(self) -> dict[str, tuple[object, ...]]:
        """Describe all files that a command may not touch."""
        seen = {}
        theirs = {self.work, self._scratch, self.home / ".cache", self.root / "spied.jsonl"}
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if Path(folder, name) not in theirs]
            for name in (*folders, *files):
                path = Path(folder, name)
                if path not in theirs and path.suffix not in (".out", ".err"):
                    seen[str(path.relative_to(self.root))] = _describe(path)
        return seen

    def find_secrets(self, outcome: Outcome, secrets: Iterable[str]) -> list[str]:
        """Return where secrets stand in what a command printed or left, also in columns and names of files."""
        places = {"stdout": outcome.run.stdout.encode(), "stderr": outcome.run.stderr.encode()}
        for folder in (self.work, self._scratch, self.home / ".cache"):
            for path in sorted(folder.rglob("*")):
                name = str(path.relative_to(self.root))
                places[f"the name {name}"] = name.encode()
                if path.is_file():
                    places[name] = path.read_bytes()
                if path.suffix == ".parquet" and path.is_file():
                    places[f"{name}, unpacked"] = repr(pq.read_table(path).to_pydict()).encode()
        wanted = [secret.encode() for secret in secrets]
        return [f"{secret.decode()} in {name}" for secret in wanted for name, text in places.items() if secret in text]


class _Program:
    """A command line in a program of its own, with what `forks.Started` offers."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str], folder: Path) -> None:
        self._outputs = tuple(folder / f"program.{name}" for name in ("out", "err"))
        with self._outputs[0].open("w") as out, self._outputs[1].open("w") as err:
            self._process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        self.pids = [self._process.pid]

    def poll(self) -> int | None:
        return self._process.poll()

    def read(self) -> tuple[str, str]:
        out, err = (path.read_text(errors="replace") for path in self._outputs)
        return out, err


def _follow(started: forks.Started | _Program, log: Path, most: float) -> tuple[int | None, float, int]:
    """Wait for the end of a command; stop it, and all it has started, at the limits of time and memory."""
    began = time.monotonic()
    grown = 0
    starts: dict[int, int] = {}
    line = ""
    with log.open() as lines:
        while (code := started.poll()) is None:
            for part in lines:
                line += part
                if line.endswith("\n"):  # else the rest of it is being written
                    event = json.loads(line)
                    line = ""
                    if event["event"] == "process":
                        starts[event["pid"]] = event["what"]
            grown = max([grown, *(spy.peak_memory(pid) - max(start, _LIBRARIES) for pid, start in starts.items())])
            if grown > MORE_MEMORY or time.monotonic() - began > most:
                for pid in (*started.pids, *starts):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                while started.poll() is None:
                    time.sleep(0.005)
                return None, time.monotonic() - began, grown
            time.sleep(0.005)
    return code, time.monotonic() - began, grown


def _describe(path: Path) -> tuple[object, ...]:
    """Describe a file itself: kind and mode, where it points to, what it holds."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return stat.filemode(status.st_mode), os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        return (stat.filemode(status.st_mode),)
    content = status.st_mtime_ns if status.st_size > _HASHED else hashlib.blake2b(path.read_bytes()).hexdigest()
    return stat.filemode(status.st_mode), status.st_size, content


def _compare(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    made = [f"made {name}" for name in after.keys() - before.keys()]
    removed = [f"removed {name}" for name in before.keys() - after.keys()]
    changed = [f"changed {name}" for name in before.keys() & after.keys() if before[name] != after[name]]
    return sorted(made + removed + changed)
