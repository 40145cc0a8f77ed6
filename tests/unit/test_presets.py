"""Data sets by name, folders of splits, and built-in names and templates."""

from pathlib import Path

import open_clip
import pytest

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.benchmark_folder import find_benchmark_folder
from clipcid_cli.formats.class_files import BUILTIN_CLASS_NAMES, BUILTIN_TEMPLATES, fill_template
from clipcid_cli.formats.presets import PRESETS, find_preset
from clipcid_cli.runtime.encoder import builtin_class_names, builtin_templates


def test_customary_metrics_are_clips() -> None:
    per_class = {name for name, preset in PRESETS.items() if preset.metric == "mean_per_class_recall"}
    assert per_class == {"aircraft", "pets", "caltech101", "flowers"}
    assert PRESETS["voc2007"].metric == "mean_average_precision_11_point"
    assert PRESETS["imagenet"].metric == PRESETS["food101"].metric == "acc1"
    assert all(preset.folder or preset.source for preset in PRESETS.values())
    for preset in PRESETS.values():
        assert preset.class_names is None or preset.class_names in BUILTIN_CLASS_NAMES
        assert preset.templates is None or preset.templates in BUILTIN_TEMPLATES


def test_a_copy_is_found_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    assert find_preset("pets", tmp_path) == (PRESETS["pets"], tmp_path / "pets")
    (tmp_path / "wds_vtab-pets").mkdir()
    assert find_preset("pets", tmp_path) == (PRESETS["pets"], tmp_path / "wds_vtab-pets")


def test_a_path_that_is_there_is_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    assert find_preset("pets", tmp_path / "elsewhere") is None
    assert find_preset("my-own", tmp_path) is None


@pytest.mark.parametrize(
    ("name", "expected", "fix"),
    [
        ("cars", "wds_cars", "hf download clip-benchmark/wds_cars --repo-type dataset"),
        ("birdsnap", "birdsnap", "one folder per class"),
    ],
)
def test_a_missing_copy_is_told_with_its_place(tmp_path: Path, name: str, expected: str, fix: str) -> None:
    with pytest.raises(ClipcidError) as caught:
        find_preset(name, tmp_path)
    assert str(tmp_path / expected) in caught.value.message
    assert fix in caught.value.fix
    assert "--data-root" in caught.value.fix


def test_plain_folders_of_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "photos" / split / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "classnames.txt").write_text("cat\n")
    found = find_benchmark_folder(str(tmp_path / "photos"))
    assert found.data == str(tmp_path / "photos" / "test")
    assert found.name == "photos"
    assert found.class_names == tmp_path / "photos" / "classnames.txt"
    with pytest.raises(ClipcidError, match="has no split 'val'; it has test, train"):
        find_benchmark_folder(str(tmp_path / "photos"), "val")


def test_classes_called_train_and_test_among_others_are_classes(tmp_path: Path) -> None:
    for name in ("train", "test", "bus"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    assert find_benchmark_folder(str(tmp_path / "photos")).data == str(tmp_path / "photos")


def test_templates_are_open_clips() -> None:
    assert [fill_template(template, "dog") for template in builtin_templates("openai")] == [
        template("dog") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]
    assert len(builtin_templates("simple")) == 7


def test_imagenet_names_by_wordnet_number() -> None:
    names = builtin_class_names("imagenet")
    assert tuple(names.values()) == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert list(names) == sorted(names)
    assert names["n01440764"] == "tench"
    assert names["n15075141"] == "toilet paper"
