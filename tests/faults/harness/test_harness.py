"""A sample of the faults every day, all of them in the slow suite: nothing is lost; and the harness notices what is.

``pytest tests/faults/harness -m slow -s`` prints the rows of the first table of tests/faults/RESULTS.md: the fault, exit
codes, cases by step, cases that the fault did not reach, all cases there are, losses, seconds.
"""

from __future__ import annotations

import collections
import functools
import itertools
import random
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from balance_data import make_rows, write_embeddings
from conftest import Run
from fault_cases import FAULTS, Fault, killed_problems
from fault_child import hasten, read_operations
from fault_disks import can_mount
from fault_place import STEPS, Site, Step, read_tree


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("site"))
    site.prepare()
    return site


def run_cases(site: Site, fault: Fault, wanted: int | None = None) -> list[str]:
    """Run cases of a fault, none of which may lose anything, until it has reached as many as wanted.

    Returns:
        The names of the steps in which it was reached, for each case.
    """
    began = time.monotonic()
    drawn = draw_cases(site, fault)
    reached: list[str] = []
    codes: collections.Counter[str] = collections.Counter()
    losses = []
    unreached = 0
    for step, case in drawn:
        if len(reached) == wanted:
            break
        site.reset(step)
        code, problems, is_reached = fault.run_case(site, step, case)
        if is_reached:
            reached.append(step.name)
            codes[str(code)] += 1
        else:
            unreached += 1
        if problems:
            losses.append(f"{fault.name}, {step.name}, {case}: " + "; ".join(problems))
    ended = ", ".join(f"{code} ({count:,})" for code, count in sorted(codes.items()))
    by_step = [str(reached.count(step.name) or "–") for step in STEPS]
    numbers = [len(reached), unreached, len(drawn), len(losses), round(time.monotonic() - began)]
    print(f"| {' | '.join([fault.name, ended, *by_step, *(f'{number:,}' for number in numbers)])} |")
    assert not losses, "\n".join(losses)
    return reached


def draw_cases(site: Site, fault: Fault) -> list[tuple[Step, Any]]:
    """Return all cases of a fault, shuffled such that they go round the steps."""
    chance = random.Random(zlib.crc32(fault.name.encode()))
    by_step = {step: fault.list_cases(site, step, chance) for step in STEPS}
    for cases in by_step.values():
        chance.shuffle(cases)
    steps = chance.sample(STEPS, len(STEPS))
    rounds = itertools.zip_longest(*([(step, case) for case in by_step[step]] for step in steps))
    return [drawn for found in rounds for drawn in found if drawn is not None]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.everyday], ids=lambda fault: fault.name)
def test_a_sample_of_a_fault_loses_nothing(site: Site, fault: Fault) -> None:
    if fault.needs_mount and not can_mount():
        pytest.skip("may not mount a disk")
    reached = run_cases(site, fault, fault.everyday)
    assert len(set(reached)) == fault.everyday


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_no_fault_loses_anything(site: Site, fault: Fault) -> None:
    run_cases(site, fault)


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
    assert killed_problems(Run((), Path(), -9, "", "Embedding")) == []
    assert killed_problems(Run((), Path(), -9, "", "Traceback (most recent call last)"))
    assert killed_problems(Run((), Path(), None, "", ""))


def test_cluster_continues_after_its_last_iteration(tmp_path: Path) -> None:
    """Killed right after it saved its progress for the second time, it goes on to the same bytes."""
    site = Site(tmp_path)
    site.place.mkdir()
    write_embeddings(site.place / "rows", make_rows(2_000, 64, noise=2.0), num_files=1)
    arguments = ("cluster", "--num-clusters", "32", "--iterations", "4", "--embeddings", "rows", "--work")
    first, whole, broken = (Step(work, (*arguments, work)) for work in ("first", "whole", "broken"))
    time.sleep(0.2)  # hashes of files that were written just now are not remembered
    assert site.run(first).returncode == 0  # those of the rows are, so that the two that follow do the same
    assert site.run(whole, functools.partial(hasten, site.log)).returncode == 0
    operations = read_operations(site.log)
    saves = [n for n, line in enumerate(operations) if line.startswith("replace") and "/..progress.npz." in line]
    assert site.run(broken, functools.partial(hasten, site.log, saves[1])).returncode == -9
    again = site.run(broken)
    assert again.returncode == 0, again
    assert "Resuming after 2 iterations" in again.stderr
    found, expected = (read_tree(site.place / step.name / "clusters") for step in (broken, whole))
    for name in ("centroids.npy", "clusters.parquet"):
        assert found[name] == expected[name], name
    assert found.keys() == expected.keys()
