"""Classes of a linear probe's splits: class folders in one and numbers in the other are matched by name, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import make_image, write_class_folders, write_tar

from clipcid_cli.errors import ClipcidError
from clipcid_cli.steps.evaluate.probe_plan import ProbePlan, make_plan
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings

FOLDERS = ("armour", "food_stall", "monster")
LINES = "Monster\narmour\nfood stall\n"


@pytest.fixture
def splits(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of class folders, and a folder with a tar of three images of the classes 0, 1 and 2."""
    folders = write_class_folders(tmp_path / "folders", {name: [0] for name in FOLDERS})
    members = [(f"{number}.png", make_image(number)) for number in range(3)]
    members += [(f"{number}.cls", str(number).encode()) for number in range(3)]
    write_tar(tmp_path / "tars" / "0.tar", sorted(members))
    return folders, tmp_path / "tars"


def plan(train: Path, test: Path) -> ProbePlan:
    return make_plan(EvalLinearSettings(model="ViT-B-32", train=str(train), test=str(test), work=test.parent / "work"))


def read_names(probe: ProbePlan, split: str) -> list[str]:
    """Return the class name of each sample of a split."""
    task = probe.splits[split]
    labels = [task.label(sample) for shard in task.dataset.shards for sample in shard.stream()]
    return [probe.classes[label] for label in labels if label is not None]


def test_a_long_name_of_the_training_images_is_cut_in_the_name_of_the_result(splits: tuple[Path, Path]) -> None:
    folders, tars = splits
    (tars / "classnames.txt").write_text(LINES)
    long = folders.rename(folders.parent / ("long_" * 40))
    stem = plan(long, tars).path.stem
    assert re.search(r"_train-(long-){12}-[0-9a-f]{8}$", stem)
    other = long.rename(long.parent / ("long_" * 41))
    assert plan(other, tars).path.stem != stem


def test_numbers_and_class_folders_are_matched_by_the_list_of_names(splits: tuple[Path, Path]) -> None:
    folders, tars = splits
    (tars / "classnames.txt").write_text(LINES)
    assert read_names(plan(folders, tars), "test") == ["monster", "armour", "food_stall"]
    turned = plan(tars, folders)
    assert read_names(turned, "train") == ["Monster", "armour", "food stall"]
    assert read_names(turned, "test") == ["armour", "food stall", "Monster"]
    before = plan(folders, tars).identity
    (tars / "classnames.txt").write_text("armour\nMonster\nfood stall\n")
    assert plan(folders, tars).identity != before  # a finished probe of other labels is not reused
    (tars / "classnames.txt").write_text(f"{LINES}pizza\n")
    with pytest.raises(ClipcidError, match=r"tars has 1 class that \S+folders lacks: pizza\."):
        plan(folders, tars)


def test_numbers_without_names_are_not_paired_with_class_folders(splits: tuple[Path, Path]) -> None:
    folders, tars = splits
    for train, test in ((folders, tars), (tars, folders)):
        with pytest.raises(ClipcidError, match=r"folders has class folders, and the classes of \S+tars have no names"):
            plan(train, test)
    numbers = write_class_folders(tars.parent / "numbers", {str(number): [number] for number in range(11)})
    assert read_names(plan(numbers, tars), "test") == ["0", "1", "2"]  # sorted as text, 10 comes before 2
    assert plan(tars, tars).splits["test"].label_of is None
