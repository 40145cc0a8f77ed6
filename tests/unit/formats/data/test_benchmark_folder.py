"""CLIP_benchmark folders: which split is read, and where its text files are found."""

from pathlib import Path

import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import find_benchmark_folder


@pytest.fixture
def food(tmp_path: Path) -> Path:
    folder = tmp_path / "food101"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("apple pie\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n")
    return folder


def test_root_means_its_test_split(food: Path) -> None:
    found = find_benchmark_folder(str(food))
    assert (found.name, found.data) == ("food101", str(food / "test"))
    assert found.class_names == food / "classnames.txt"
    assert found.templates == food / "zeroshot_classification_templates.txt"
    assert found.dataset_type is None


def test_split_folder_finds_the_files_beside_it(food: Path) -> None:
    found = find_benchmark_folder(str(food / "train"))
    assert (found.name, found.data) == ("food101/train", str(food / "train"))
    assert found.class_names == food / "classnames.txt"


def test_dataset_type_is_read(food: Path) -> None:
    (food / "dataset_type.txt").write_text("Retrieval\n")
    assert find_benchmark_folder(str(food)).dataset_type == "retrieval"


def test_missing_split_is_named(food: Path) -> None:
    with pytest.raises(ClipcidError, match=r"no split 'val'; it has test, train") as error:
        find_benchmark_folder(str(food), split="val")
    assert "--split" in error.value.fix


@pytest.mark.parametrize("data", ["s3://bucket/photos/{0..3}.tar", "nowhere/photos"])
def test_other_data_is_taken_as_it_is(data: str) -> None:
    found = find_benchmark_folder(data)
    assert found.data == data
    assert found.class_names is None
