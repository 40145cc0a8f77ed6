"""A sample of the faults every day, all of them in the slow suite: nothing is lost; and the harness notices what is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fault_cases import FAULTS, killed_problems
from fault_disks import can_mount
from fault_place import STEPS, Site, read_tree
from harness import DOCUMENT
from one_process import Outcome

HARNESS = Path(__file__).with_name("harness.py")


def run_harness(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, str(HARNESS), "--json", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    reached = {name: {step for step, count in row["cases"].items() if count} for name, row in rows.items()}
    assert reached["killed"] == {step.name for step in STEPS}
    possible = {fault.name for fault in FAULTS if fault.everyday and (can_mount() or not fault.needs_mount)}
    assert possible <= {name for name, steps in reached.items() if steps}


def test_a_sample_of_faults_loses_nothing() -> None:
    run_harness()


@pytest.mark.slow
def test_no_fault_loses_anything() -> None:
    run_harness("--all", "--jobs", "2")


def test_losses_are_noticed(tmp_path: Path) -> None:
    site, step = Site(tmp_path), STEPS[0]
    for folder in (site.place, site.before(step)):
        folder.mkdir()
    for name in ("whole.npy", "half.npy", "gone.npy", "embed.json"):
        (site.place / name).write_text('{"counts": 1, "seconds": 2}')
    site.expected[step.name] = read_tree(site.place)
    assert site.compare(step) == site.find_half(step) == []
    (site.place / "embed.json").write_text('{"counts": 1, "seconds": 3}')
    (site.place / "half.npy").write_text("ha")
    (site.place / "gone.npy").unlink()
    (site.place / ".stray.partial").touch()
    assert sorted(site.compare(step)) == ["left over: .stray.partial", "missing: gone.npy", "other bytes: half.npy"]
    assert site.find_half(step) == ["half under its final name: half.npy"]


def test_words_of_a_killed_run_are_noticed() -> None:
    assert killed_problems(Outcome((), -9, "", "Embedding")) == []
    assert killed_problems(Outcome((), -9, "", "Traceback (most recent call last)"))
    assert killed_problems(Outcome((), None, "", ""))


def test_every_fault_has_its_line_in_the_documents() -> None:
    page = DOCUMENT.read_text(encoding="utf-8")
    for fault in FAULTS:
        assert f"- **{fault.name}**: {fault.result}" in page
