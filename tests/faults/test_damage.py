"""Damage to every kind of file that a step reads: one error of two sentences, or a result; no hang, no traceback."""

import os
import random
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import TARGETS, damage, make_place
from one_process import OneProcess

SEED = 13
EVERYDAY, MANY = 8, 140
"""Cases of each kind of file."""


@pytest.fixture(scope="module")
def clipcid() -> Iterator[OneProcess]:
    process = OneProcess()
    yield process
    process.close()


@pytest.fixture(scope="module")
def whole(clipcid: OneProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole") / "place"
    place.mkdir()
    make_place(clipcid, place)
    return place


def run_cases(clipcid: OneProcess, whole: Path, scratch: Path, name: str, first: int, count: int) -> None:
    """Run some of the cases of one kind of file and report all that break the rules."""
    target, broken = TARGETS[name], []
    for number in range(first, first + count):
        chance = random.Random(SEED + number * 1_000_003 + zlib.crc32(name.encode()))
        place = scratch / "place"
        shutil.copytree(whole, place, copy_function=os.link, symlinks=True)
        done = damage(place, target, chance)
        found = clipcid(*target.command, cwd=place)
        problems = found.problems()
        problems += [f"left {path.name}" for path in place.rglob("*.partial")]
        if problems:
            broken.append(f"case {number}: {done}: {', '.join(problems)}{found!r}")
        shutil.rmtree(place)
    assert not broken, f"{len(broken)} of {count} cases\n" + "\n".join(broken)


@pytest.mark.parametrize("name", TARGETS)
def test_damage(clipcid: OneProcess, whole: Path, tmp_path: Path, name: str) -> None:
    run_cases(clipcid, whole, tmp_path, name, 0, EVERYDAY)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_much_damage(clipcid: OneProcess, whole: Path, tmp_path: Path, name: str) -> None:
    run_cases(clipcid, whole, tmp_path, name, EVERYDAY, MANY)
