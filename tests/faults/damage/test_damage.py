"""Damage to every kind of file that a step reads: one error of two sentences, or a result; no hang, no traceback."""

from pathlib import Path

import pytest
from damage import TARGETS, make_place, run_cases
from one_process import OneProcess

EVERYDAY = range(4)
MANY = range(4, 148)


@pytest.fixture(scope="module")
def whole(one_process: OneProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole") / "place"
    place.mkdir()
    make_place(one_process, place)
    return place


@pytest.mark.parametrize("numbers", [EVERYDAY, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("name", TARGETS)
def test_damage(one_process: OneProcess, whole: Path, tmp_path: Path, name: str, numbers: range) -> None:
    losses = run_cases(one_process, whole, tmp_path, name, numbers)
    assert not losses, "\n".join(losses)
