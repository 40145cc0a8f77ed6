"""Data sets to evaluate on: by name or folder, the split and the files beside it, names and templates built in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import open_clip
import pytest
from balance_data import heard

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import (
    BUILTIN_CLASS_NAMES,
    BUILTIN_TEMPLATES,
    KNOWN_DATASETS,
    customary_metric,
    fill_template,
    find_benchmark_folder,
    find_known_dataset,
    hash_lines,
    read_class_names,
    read_templates,
)
from clipcid_cli.runtime.models.prompts import builtin_class_names, builtin_templates
from clipcid_cli.steps.evaluate.task_plan import find_copy


@pytest.mark.parametrize(("inner", "name", "data"), [("", "food", "food/test"), ("train", "food/train", "food/train")])
def test_a_folder_of_splits_means_its_test_split_with_the_files_beside_it(
    tmp_path: Path, inner: str, name: str, data: str
) -> None:
    food = tmp_path / "food"
    for split in ("train", "test"):
        (food / split).mkdir(parents=True)
        (food / split / "nshards.txt").write_text("1\n")
    for file in ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"):
        (food / file).write_text("Retrieval\n")
    found = find_benchmark_folder(str(food / inner))
    assert (found.name, found.data) == (name, str(tmp_path / data))
    assert found.class_names == food / "classnames.txt"
    assert found.templates == food / "zeroshot_classification_templates.txt"
    assert found.dataset_type == "retrieval"


def test_plain_folders_of_splits_are_read_alike_and_classes_called_train_and_test_are_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
    photos = find_benchmark_folder(str(tmp_path / "photos"))
    assert (photos.data, photos.plain_splits) == (str(tmp_path / "photos" / "test"), ("test", "train"))
    with pytest.raises(ClipcidError, match="has no split 'val'; it has test, train") as error:
        find_benchmark_folder(str(tmp_path / "photos"), "val")
    assert "--split" in error.value.fix
    (tmp_path / "photos" / "bus").mkdir()
    assert find_benchmark_folder(str(tmp_path / "photos")).data == str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("/data/cars/test", "cars/test"),
        ("/data/cars/val/{00000..00003}.tar", "cars/val/{00000..00003}.tar"),
        ("/data/cars/0.tar", "cars/0.tar"),
        ("/data/cars.tar", "cars.tar"),
        ("/data/2024/test", "2024/test"),
        ("/data/cars.csv", "cars.csv"),
        ("s3://bucket/cars/train", "cars/train"),
    ],
)
def test_other_data_is_taken_as_it_is_and_its_name_begins_with_what_tells(data: str, name: str) -> None:
    found = find_benchmark_folder(data)
    assert (found.name, found.data, found.class_names) == (name, data, None)


def test_customary_metrics_are_clips() -> None:
    per_class = {name for name, known in KNOWN_DATASETS.items() if known.metric == "mean_per_class_recall"}
    assert per_class == {"aircraft", "pets", "caltech101", "flowers"}
    assert KNOWN_DATASETS["voc2007"].metric == "mean_average_precision_11_point"
    assert KNOWN_DATASETS["imagenet"].metric == KNOWN_DATASETS["food101"].metric == "acc1"
    for known in KNOWN_DATASETS.values():
        assert known.folder or known.source
        assert known.class_names is None or known.class_names in BUILTIN_CLASS_NAMES
        assert known.templates is None or known.templates in BUILTIN_TEMPLATES
    assert customary_metric("wds_vtab-pets/test", ("acc1", "mean_per_class_recall")) == "mean_per_class_recall"
    assert customary_metric("voc2007", ("acc1", "mean_per_class_recall")) == "acc1"


def test_a_name_of_the_suite_means_its_copy_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copies, pets = tmp_path / "copies", KNOWN_DATASETS["pets"]
    (tmp_path / "pets").mkdir()
    (copies / "pets").mkdir(parents=True)
    with heard() as told:
        assert find_copy("pets", copies) == find_known_dataset("pets", copies) == (pets, copies / "pets")
    assert "to use it, write ./pets" in told[1]
    assert find_known_dataset("./pets", copies) is None
    assert find_known_dataset(f"pipe:cat {300 * 'x'}", copies) is None  # no file can have such a name
    with pytest.raises(ClipcidError, match=r"The path of that name is \./pets"):
        find_known_dataset("pets", tmp_path / "elsewhere")
    with heard() as told:
        assert find_copy("pets", Path()) == (pets, Path("pets"))
    assert len(told) == 1  # the path is the copy
    (copies / "wds_vtab-pets").mkdir()
    assert find_known_dataset("pets", copies) == (pets, copies / "wds_vtab-pets")


def test_a_missing_copy_is_told_and_so_is_a_name_close_to_one_of_the_suite(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="imagenett") as found:
        find_known_dataset("imagenett", tmp_path)
    assert found.value.fix == "Did you mean imagenet?"
    assert find_known_dataset("photos", tmp_path) is None
    (tmp_path / "imagenett").mkdir()
    assert find_known_dataset(str(tmp_path / "imagenett"), tmp_path) is None
    with pytest.raises(ClipcidError, match=f"{tmp_path}/birdsnap") as found:
        find_known_dataset("birdsnap", tmp_path)
    assert "one folder per class" in found.value.fix
    assert "--data-root" in found.value.fix


def test_names_and_templates_built_in_are_open_clips() -> None:
    assert [fill_template(template, "dog") for template in builtin_templates("openai")] == [
        template("dog") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]
    assert len(builtin_templates("simple")) == 7
    names = builtin_class_names("imagenet")
    assert tuple(names.values()) == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert list(names) == sorted(names)  # by WordNet number
    assert (names["n01440764"], names["n15075141"]) == ("tench", "toilet paper")


def write(folder: Path, content: bytes) -> Path:
    path = folder / "lines.txt"
    path.write_bytes(content)
    return path


def test_lines_of_a_file_are_stripped_and_their_hash_is_that_of_the_file(tmp_path: Path) -> None:
    lines = "\ufeffapple pie\r\n  baby back ribs \nbaklava\n\n\n"
    assert read_class_names(write(tmp_path, lines.encode())) == ("apple pie", "baby back ribs", "baklava")
    plain = "apple pie\ncafé\n".encode()
    assert hash_lines(read_class_names(write(tmp_path, plain))) == hashlib.blake2b(plain, digest_size=6).hexdigest()
    hashes = [hash_lines(lines) for lines in (("ab", "c"), ("a", "bc"), ("c", "ab"), ("abc",), ("ab", "c", ""), ())]
    assert len(set(hashes)) == len(hashes)
    templates = read_templates(write(tmp_path, b"a photo of a {c}.\na drawing of {}.\n"))
    assert [fill_template(each, "{x}") for each in templates] == ["a photo of a {x}.", "a drawing of {x}."]
    assert fill_template("{c} {c.__class__} {0}", "cat") == "cat {c.__class__} {0}", "never a format string"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no class name"),
        (b"a\n\nb\n", "line 2 is empty"),  # it would shift labels
        (b"\na\n", "line 1 is empty"),
        (b"\xff\xfe\x00a", "cannot be read as UTF-8 text"),
    ],
)
def test_lines_that_are_no_class_names_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ClipcidError, match=message):
        read_class_names(write(tmp_path, content))


def test_a_template_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match=r"line 2: 'a cat' has no placeholder"):
        read_templates(write(tmp_path, b"a {c}\na cat\n"))
