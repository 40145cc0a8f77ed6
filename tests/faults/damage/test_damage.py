"""Damage to every kind of file that a step reads: one error of two sentences, or a result; no hang, no traceback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from damage import TARGETS, make_place
from one_process import OneProcess
from run_damage import EVERYDAY, MANY, run_cases


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


@pytest.mark.parametrize("name", TARGETS)
def test_damage(clipcid: OneProcess, whole: Path, tmp_path: Path, name: str) -> None:
    found = run_cases(clipcid, whole, tmp_path, name, range(EVERYDAY))
    assert not found.losses, "\n".join(found.losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_much_damage(clipcid: OneProcess, whole: Path, tmp_path: Path, name: str) -> None:
    found = run_cases(clipcid, whole, tmp_path, name, range(EVERYDAY, EVERYDAY + MANY))
    assert not found.losses, f"{len(found.losses)} of {MANY} cases\n" + "\n".join(found.losses)
