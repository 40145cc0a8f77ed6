"""Data sets by name, folders of splits, and built-in names and templates."""

from pathlib import Path

import open_clip
import pytest
from conftest import make_image

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.data.benchmark import (
    BUILTIN_CLASS_NAMES,
    BUILTIN_TEMPLATES,
    KNOWN_DATASETS,
    customary_metric,
    fill_template,
    find_benchmark_folder,
    find_known_dataset,
)
from clipcid_cli.runtime.models.clip_model import builtin_class_names, builtin_templates
from clipcid_cli.steps.evaluate.linear import make_plan
from clipcid_cli.steps.evaluate.tasks import find_copy, plan_tasks
from clipcid_cli.steps.reporting import Reporter
from clipcid_cli.steps.settings.eval_linear import EvalLinearSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings


def test_customary_metrics_are_clips() -> None:
    per_class = {name for name, known in KNOWN_DATASETS.items() if known.metric == "mean_per_class_recall"}
    assert per_class == {"aircraft", "pets", "caltech101", "flowers"}
    assert KNOWN_DATASETS["voc2007"].metric == "mean_average_precision_11_point"
    assert KNOWN_DATASETS["imagenet"].metric == KNOWN_DATASETS["food101"].metric == "acc1"
    assert all(known.folder or known.source for known in KNOWN_DATASETS.values())
    for known in KNOWN_DATASETS.values():
        assert known.class_names is None or known.class_names in BUILTIN_CLASS_NAMES
        assert known.templates is None or known.templates in BUILTIN_TEMPLATES


def test_a_copy_is_found_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    assert find_known_dataset("pets", tmp_path) == (KNOWN_DATASETS["pets"], tmp_path / "pets")
    (tmp_path / "wds_vtab-pets").mkdir()
    assert find_known_dataset("pets", tmp_path) == (KNOWN_DATASETS["pets"], tmp_path / "wds_vtab-pets")


class Listener(Reporter):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep a note."""
        self.notes.append(text)


def test_a_name_of_the_suite_means_its_data_set_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    (tmp_path / "copies" / "pets").mkdir(parents=True)
    found = (KNOWN_DATASETS["pets"], tmp_path / "copies" / "pets")
    assert find_known_dataset("pets", tmp_path / "copies") == found
    assert find_known_dataset("./pets", tmp_path / "copies") is None
    assert find_known_dataset("my-own", tmp_path) is None
    with pytest.raises(ClipcidError, match=r"The path of that name is \./pets"):
        find_known_dataset("pets", tmp_path / "elsewhere")
    listener = Listener()
    assert find_copy("pets", tmp_path / "copies", listener) == found
    assert "to use it, write ./pets" in listener.notes[1]
    listener = Listener()
    assert find_copy("pets", Path(), listener) == (KNOWN_DATASETS["pets"], Path("pets"))
    assert len(listener.notes) == 1  # the path is the copy


def test_the_customary_metric_is_found_by_folder_too(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            image = tmp_path / "wds_vtab-pets" / split / name / "0.png"
            image.parent.mkdir(parents=True)
            image.write_bytes(make_image(1))
    folder = str(tmp_path / "wds_vtab-pets")
    (task,) = plan_tasks(EvalZeroshotSettings(data=(folder,)), Reporter())
    probe = make_plan(EvalLinearSettings(model="ViT-B-32", data=folder), Reporter())
    assert task.customary == probe.metric == "mean_per_class_recall"
    assert customary_metric("wds_vtab-pets/test", ("acc1", "mean_per_class_recall")) == "mean_per_class_recall"
    assert customary_metric("voc2007", ("acc1", "mean_per_class_recall")) == "acc1"


@pytest.mark.parametrize(
    ("name", "expected", "fix"),
    [
        ("cars", "wds_cars", "hf download clip-benchmark/wds_cars --repo-type dataset"),
        ("birdsnap", "birdsnap", "one folder per class"),
    ],
)
def test_a_missing_copy_is_told_with_its_place(tmp_path: Path, name: str, expected: str, fix: str) -> None:
    with pytest.raises(ClipcidError) as caught:
        find_known_dataset(name, tmp_path)
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
