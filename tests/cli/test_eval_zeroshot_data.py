"""`eval-zeroshot` from the command line: the forms of data, class names and labels it reads."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from conftest import Clipcid, embed_with_open_clip, make_image, write_benchmark, write_class_folders, write_tar
from sklearn.metrics import average_precision_score


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Class-per-folder images; the names sort otherwise than a list of classes might."""
    classes = {"zebra_fish": range(4), "apple": range(4, 7), "mug": range(7, 12)}
    return write_class_folders(tmp_path / "photos", classes)


def test_class_folders_in_another_order(clipcid: Clipcid, tiny_model: Path, folders: Path, tmp_path: Path) -> None:
    by_folder = clipcid("eval-zeroshot", tiny_model, folders, "--json", "--work", "a")
    assert by_folder.json["metrics"]["acc5"] is None
    assert "acc5 is null" in by_folder.stderr
    (tmp_path / "names.txt").write_text("Zebra fish\nmug\napple\n")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n")
    prompts = ("--classnames", "names.txt", "--templates", "templates.txt")
    listed = clipcid("eval-zeroshot", tiny_model, folders, *prompts, "--json", "--work", "b").json
    # Matched by name, only the letter Z differs; the tokenizer lowers it.
    assert listed["metrics"] == by_folder.json["metrics"]


def test_splits_have_names_that_tell(clipcid: Clipcid, tiny_model: Path, folders: Path, tmp_path: Path) -> None:
    for name in ("cars", "pets"):
        shutil.copytree(folders, tmp_path / name / "test")
    results = clipcid("eval-zeroshot", tiny_model, "cars/test", "pets/test", "--json").json["results"]
    assert [result["dataset"] for result in results] == ["cars/test", "pets/test"]
    names = [Path(result["files"]["metrics"]).name for result in results]
    assert names == [f"{name}-test_tiny_zeroshot_classification.json" for name in ("cars", "pets")]


def test_list_with_labels(clipcid: Clipcid, tiny_model: Path, folders: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("zebra fish\nmug\n")
    call = ("eval-zeroshot", tiny_model, "list.csv", "--classnames", "names.txt", "--json", "--work")
    listed = "title,filepath,label\na fish,photos/zebra_fish/0.png,0\na mug,photos/mug/7.png,"
    (tmp_path / "list.csv").write_text(f"{listed}1\n")
    measured = clipcid(*call, "one")
    assert measured.json["images"] == 2
    assert "its classes are measured. For its captions: eval-zeroshot --task retrieval" in measured.said
    (tmp_path / "list.csv").write_text(f"{listed.replace('.png,0', '.png,')}1\n")
    others = clipcid(*call[:3], "--dry-run").said
    assert "its captions are measured. For its classes: eval-zeroshot --task classification" in others
    (tmp_path / "list.csv").write_text(f"{listed}2\n")
    assert "has class 2, and there are 2 class names" in clipcid(*call, "other", code=1).json["error"]


def test_several_classes_an_image(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    """A CLIP_benchmark folder of type multilabel, and the same data as a list."""
    vectors = [[int((number + step) % 3 == 0 and number % 5 != step) for step in range(4)] for number in range(16)]
    members, lines = [], ["filepath,label"]
    for number, vector in enumerate(vectors):
        content = io.BytesIO()
        np.save(content, np.array(vector, np.float32))
        members += [(f"{number:02d}.npy", content.getvalue()), (f"{number:02d}.png", make_image(number))]
        (tmp_path / f"{number:02d}.png").write_bytes(make_image(number))
        lines.append(f"{number:02d}.png,{' '.join(str(place) for place in range(4) if vector[place])}")
    texts = {"dataset_type": "multilabel", "classnames": "red\ngreen\nblue\ndark\n"}
    folder = write_benchmark(tmp_path / "many", "test", members, **texts)
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    prompted = ("--classnames", folder / "classnames.txt", "--templates", "simple")
    run = clipcid("eval-zeroshot", tiny_model, folder, "list.csv", *prompted, "--predictions", "--json")
    shards, listed = run.json["results"]
    assert shards["metrics"] == listed["metrics"]
    assert shards["task"] == "zeroshot_classification"

    prompts = [t(name) for name in ("red", "green", "blue", "dark") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    images, rows = embed_with_open_clip(tiny_model, [make_image(number) for number in range(16)], prompts)
    weights = torch.nn.functional.normalize(rows.view(4, 7, -1).mean(dim=1), dim=-1)
    expected = average_precision_score(np.array(vectors), (images @ weights.T).numpy(), average="macro")
    assert shards["metrics"]["mean_average_precision"] == pytest.approx(expected, abs=1e-6)
    low, high = shards["intervals"]["mean_average_precision_11_point"]
    assert low <= shards["metrics"]["mean_average_precision_11_point"] <= high
    file = shards["files"]["metrics"]
    both = f"{file},{file}"
    for sides in ((file, file), (both, both)):
        answer = clipcid("eval-zeroshot", "--compare", *sides, "--json").json["differences"]["mean_average_precision"]
        assert (answer["difference"], answer["interval"], answer["real"]) == (0.0, [0.0, 0.0], False)


def test_data_sets_by_name_with_imagenets_classes(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    """Plain copies of two shifts of ImageNet: class folders by WordNet number, and by number, where 10 comes before 2."""
    for folder, names in (("imagenet-r", ("n01443537", "n02085620")), ("imagenetv2", ("2", "10", "152"))):
        write_class_folders(tmp_path / "copies" / folder / "test", dict.fromkeys(names, (0,)))
    missing = clipcid("eval-zeroshot", tiny_model, "food101", "--data-root", "copies", code=1)
    assert "expected in copies/wds_food101" in missing.said
    assert "hf download clip-benchmark/wds_food101" in missing.stderr
    given = ("--data-root", "copies", "--templates", "simple", "--predictions", "--json")
    run = clipcid("eval-zeroshot", tiny_model, "imagenet-r", "imagenetv2", *given)
    shift, numbered = run.json["results"]
    assert "2 of ImageNet's 1,000 classes" in run.said
    assert (shift["dataset"], shift["customary"], shift["metrics"]["acc5"]) == ("imagenet-r", "acc1", None)
    rows = pd.read_parquet(tmp_path / numbered["files"]["predictions"])
    assert dict(zip(rows["key"], rows["label"], strict=True)) == {"2/0": 2, "10/0": 10, "152/0": 152}
    sidecar = json.loads((tmp_path / "clipcid-work/eval/sidecars" / Path(shift["files"]["metrics"]).name).read_text())
    assert sidecar["settings"]["class_names"] == ["goldfish", "Chihuahua"]
    assert len(sidecar["settings"]["templates"]) == 7


def test_lines_as_captions_are_another_measurement(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    members = [(f"{number}.png", make_image(number)) for number in range(6)]
    members += [(f"{number}.txt", f"a red door\nnumber {number}".encode()) for number in range(6)]
    write_tar(tmp_path / "pairs.tar", sorted(members))
    call = ("eval-zeroshot", tiny_model, "pairs.tar", "--caption-key", "txt", "--caption-key", "again")
    assert "Samples without a caption: 6 of again." in clipcid(*call).said
    lines = clipcid(*call, "--caption-lines", "--json").json
    assert Path(lines["files"]["metrics"]).stem.endswith("_caption-key-txt_caption-key-again_caption-lines")
    assert len(list(Path("clipcid-work/eval").glob("*.json"))) == 2
