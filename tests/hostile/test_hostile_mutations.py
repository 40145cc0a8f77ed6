"""Valid files, changed at random: whatever a command makes of them, it does nothing that no data may cause."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hostile_place import Place
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "faults" / "damage"))
from test_damage import TARGETS, damage, make_place, write_files

# These need no step before the one that reads them.
_INPUTS = ("tar", "image", "caption", "csv", "tsv", "list", "npz", "model", "weights")
_CHANGES = st.lists(st.integers(0, 2**32), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, models, lists and another tool's embeddings; treat them as read-only."""
    folder = tmp_path_factory.mktemp("inputs") / "place"
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with what every step makes of it."""
    folder = tmp_path_factory.mktemp("whole") / "place"
    folder.mkdir()
    make_place(folder)
    return folder


def try_changed(source: Path, name: str, seeds: list[int]) -> None:
    """Change a file in one way after another, and run the command that reads it."""
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        place = Place(Path(folder, "place"))
        place.work.rmdir()
        shutil.copytree(source, place.work, copy_function=os.link, symlinks=True)
        done = []
        for seed in seeds:
            path = next(place.work.glob(target.file), None)
            if path is not None and path.is_file():
                try:
                    done.append(damage(place.work, target, random.Random(seed)))
                except Exception as error:  # what was changed before is no longer of its form
                    done.append(repr(error))
        outcome = place.run(*target.command, seconds=60)
        assert not outcome.problems(), (name, seeds, done, outcome)


_NOT_SHRUNK = (Phase.explicit, Phase.generate)  # a smaller seed is no simpler change


@settings(max_examples=8, derandomize=True, phases=_NOT_SHRUNK, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(_INPUTS), seeds=_CHANGES)
def test_changed_inputs_do_no_harm(inputs: Path, name: str, seeds: list[int]) -> None:
    try_changed(inputs, name, seeds)


@pytest.mark.slow
@settings(max_examples=3000, derandomize=True, phases=_NOT_SHRUNK, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(TARGETS)), seeds=_CHANGES)
def test_whatever_is_changed_does_no_harm(whole: Path, name: str, seeds: list[int]) -> None:
    try_changed(whole, name, seeds)
