"""The spy sees, and refuses, what it is there for; what commands do of themselves is no finding."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import spy
from conftest import shard_members, write_tar
from hostile_place import Place

_MISDEEDS = """
import os, socket, subprocess, sys
import fsspec
def attempt(action, *arguments, **options):
    try:
        action(*arguments, **options)
    except OSError:
        pass
attempt(os.system, "touch {root}/touched")
attempt(subprocess.run, ["touch", "{root}/touched"])
attempt(open, "{root}/home/.bashrc", "a")
attempt(open, "{root}/work/link", "w")
attempt(os.rename, "{root}/work/own", "{root}/home/.profile")
attempt(os.symlink, "{root}/work/own", "{root}/home/link")
attempt(open, "{root}/work/also-private")
attempt(socket.create_connection, ("127.0.0.1", 9), 1)
attempt(socket.create_connection, ("169.254.169.254", 80), 1)
attempt(socket.create_connection, ("evil.test", 80), 1)
attempt(fsspec.filesystem, "reference")
sys.path.insert(0, "{root}/data")
attempt(__import__, "foreign")
open("{root}/work/own", "w").close()
"""
_SEEN = [
    "started a process: os.system touch",
    "started a process: subprocess.Popen touch",
    "wrote outside (open): {root}/home/.bashrc",
    "wrote outside (open): {root}/home/.profile",
    "wrote outside (os.rename): {root}/home/.profile",
    "wrote outside (os.symlink): {root}/home/link",
    "read a private file: {root}/work/also-private",
    "connected: 127.0.0.1:9",
    "connected: 169.254.169.254:80",
    "looked up: evil.test",
    "reached for a file system: fsspec.implementations.reference",
    "ran code: {root}/data/foreign.py",
]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def test_misdeeds_are_seen_and_refused(place: Place) -> None:
    (place.data / "foreign.py").write_text("open('ran', 'w').close()\n")
    (place.work / "own").touch()
    (place.work / "link").symlink_to(place.home / ".profile")
    (place.work / "also-private").symlink_to(place.private)
    before = place.look()
    log = place.root / "spied.jsonl"
    rules = spy.Rules(str(log), str(place.root), (str(place.work),), (str(place.private),))
    variables = {
        spy.VARIABLE: json.dumps(dataclasses.asdict(rules)),
        "PYTHONPATH": str(Path(spy.__file__).with_name("startup")),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    program = _MISDEEDS.format(root=place.root)
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **variables}, cwd=place.work, check=False)
    assert done.returncode == 0
    events = map(json.loads, log.read_text().splitlines())
    seen = [f"{event['event']}: {event['what']}" for event in events if event.get("refused")]
    assert len(seen) == len(_SEEN), seen
    for event, expected in zip(seen, _SEEN, strict=True):
        assert event.startswith(expected.format(root=place.root)), event
    assert place.look() == before


def test_what_commands_do_of_themselves_is_no_finding(place: Place, tiny_model: Path) -> None:
    write_tar(place.data / "0.tar", shard_members(0, 12))
    for words in (
        ("embed", place.data, "--model", tiny_model),
        ("balance", "--keep", "0.7"),
        ("cluster", "--num-clusters", 3),
    ):
        outcome = place.run(*words)
        assert not outcome.problems(), outcome


@pytest.mark.slow
def test_workers_of_a_program_are_watched(place: Place, tiny_model: Path) -> None:
    write_tar(place.data / "0.tar", shard_members(0, 12))
    outcome = place.run("embed", place.data, "--model", tiny_model, "--workers", 1, real=True, seconds=60)
    assert not outcome.problems(), outcome
    assert len(outcome.notes("process")) >= 3, "the program, the server of workers, a worker"
