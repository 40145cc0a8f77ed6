"""`eval-zeroshot` from the command line, on real shards with a real (tiny, random) model."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    Clipcid,
    embed_with_open_clip,
    make_caption,
    make_image,
    shard_members,
    write_benchmark,
    write_tar,
    write_tiny_model,
)

from clipcid_cli.runtime.randomness import key_fractions

CLASS_NAMES = ("red thing", "green thing", "blue thing", "dark thing", "bright thing", "pale thing")
TEMPLATES = ("a photo of a {c}.", "a drawing of {}")
SAMPLES = 30


def label_of(number: int) -> int:
    return (number * number) % 5  # class 5 has no image


@pytest.fixture(scope="module")
def classification(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP_benchmark folder: a test split of two shards, 18 and 12 samples, six classes of which five occur."""
    members = []
    for number in range(SAMPLES):
        members.append((f"s{number:07d}.cls", str(label_of(number)).encode()))
        members.append((f"s{number:07d}.webp", make_image(number, kind="WEBP")))
    classnames, templates = ("".join(f"{line}\n" for line in lines) for lines in (CLASS_NAMES, TEMPLATES))
    texts = {"classnames": classnames, "zeroshot_classification_templates": templates}
    return write_benchmark(tmp_path_factory.mktemp("data") / "things", "test", members[:36], members[36:], **texts)


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP_benchmark retrieval folder: 24 images with one or two captions."""
    members = []
    for number in range(24):
        captions = [make_caption(number)] + ([make_caption(100 + number)] if number % 3 == 0 else [])
        members.append((f"{number:04d}.jpg", make_image(number, kind="JPEG")))
        members.append((f"{number:04d}.txt", "\n".join(captions).encode()))
    return write_benchmark(tmp_path_factory.mktemp("data") / "captions", "test", members, dataset_type="retrieval")


def test_classification_is_open_clips(clipcid: Clipcid, tiny_model: Path, classification: Path, tmp_path: Path) -> None:
    result = clipcid("eval-zeroshot", tiny_model, classification, "--json").json

    images = [make_image(number, kind="WEBP") for number in range(SAMPLES)]
    prompts = [template.replace("{c}", name).replace("{}", name) for name in CLASS_NAMES for template in TEMPLATES]
    image_rows, prompt_rows = embed_with_open_clip(tiny_model, images, prompts)
    weights = prompt_rows.view(len(CLASS_NAMES), len(TEMPLATES), -1).mean(dim=1)
    scores = image_rows @ torch.nn.functional.normalize(weights, dim=-1).T
    labels = torch.tensor([label_of(number) for number in range(SAMPLES)])
    right = scores.argmax(dim=1) == labels
    assert result["metrics"]["acc1"] == pytest.approx(right.double().mean().item(), abs=1e-9)
    top = scores.topk(5).indices
    assert result["metrics"]["acc5"] == pytest.approx((top == labels[:, None]).any(1).double().mean().item(), abs=1e-9)
    recalls = [right[labels == label].double().mean().item() for label in labels.unique()]
    assert result["metrics"]["mean_per_class_recall"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-9)

    assert (result["images"], result["skipped"]) == (SAMPLES, {})
    classes = len(CLASS_NAMES)
    assert result["chance"] == {"acc1": 1 / classes, "acc5": 5 / classes, "mean_per_class_recall": 1 / classes}
    assert result["majority"] == torch.bincount(labels).max().item() / SAMPLES
    written = json.loads((tmp_path / result["files"]["metrics"]).read_text())
    assert set(written) == {"dataset", "model", "pretrained", "task", "language", "metrics"}
    assert written == {field: result[field] for field in written}
    assert (written["dataset"], written["task"]) == ("things", "zeroshot_classification")
    folder = tmp_path / "clipcid-work" / "eval"
    assert sorted(os.listdir(folder)) == ["sidecars", Path(result["files"]["metrics"]).name]
    for name, (low, high) in result["intervals"].items():
        assert low <= result["metrics"][name] <= high
    sidecar = json.loads((folder / "sidecars" / Path(result["files"]["metrics"]).name).read_text())
    assert all(sidecar[name] == result[name] for name in ("chance", "majority"))
    assert sidecar["prompts"] == result["prompts"]
    for label, row in enumerate(sidecar["per_class"]):
        guesses = torch.bincount(scores.argmax(dim=1)[labels == label], minlength=len(CLASS_NAMES)).tolist()
        wrong = [*guesses[:label], 0, *guesses[label + 1 :]]
        assert (row["images"], row["confused"]) == (sum(guesses), max(wrong))
        assert row["value"] == (guesses[label] / sum(guesses) if sum(guesses) else None)
        assert row["confused_with"] == (CLASS_NAMES[wrong.index(max(wrong))] if max(wrong) else None)
    for kind, name in (("class_names", "classnames.txt"), ("templates", "zeroshot_classification_templates.txt")):
        path = classification / name
        digest = hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest()
        number = len(path.read_text().splitlines())
        assert result["prompts"][kind] == {"source": str(path), "number": number, "hash": digest}


def test_many_models_and_data_sets_are_reused_until_something_changes(
    clipcid: Clipcid, tiny_model: Path, classification: Path, retrieval: Path, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    data = tmp_path / "things"
    shutil.copytree(classification, data)
    call = ("eval-zeroshot", tiny_model, data, retrieval, "--model", other)

    shown = clipcid(*call).said
    again = clipcid(*call, "--json").json["results"]
    largest = 100 * again[0]["majority"]
    chance = f"chance: acc1 16.7, acc5 83.3, per class 16.7; always the largest class: acc1 {largest:.1f}"
    assert chance in shown
    assert "chance: image R@1/5/10 4.2 / 20.8 / 41.7, text R@1/5/10" in shown
    pairs = [(model, dataset) for model in ("tiny", "other") for dataset in ("things", "captions")]
    assert [(one["model"], one["dataset"]) for one in again] == pairs
    assert all(one["reused"] for one in again)
    assert clipcid(*call, "--dry-run").said.count(" already holds ") == 4

    table = pd.read_csv(tmp_path / "clipcid-work" / "eval-zeroshot" / "results.csv")
    assert table["dataset"].tolist() == ["things", "captions"] * 2
    assert table["acc1"].iloc[0] == again[0]["metrics"]["acc1"]
    assert np.isnan(table["acc1"].iloc[1])
    assert table["image_retrieval_recall@5_high"].iloc[1] == again[1]["intervals"]["image_retrieval_recall@5"][1]
    # Other draws change the intervals only, and are no reason to refuse.
    drawn = clipcid("eval-zeroshot", tiny_model, data, "--bootstrap", 50, "--json").json
    assert not drawn["reused"]
    assert drawn["metrics"] == again[0]["metrics"]
    assert drawn["intervals"] != again[0]["intervals"]

    (data / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    refused = clipcid(*call, code=1)
    assert "settings.templates" in refused.stderr
    assert "--overwrite" in refused.stderr

    write_tiny_model(other, seed=2)
    assert "open_clip_model.safetensors" in clipcid("eval-zeroshot", other, retrieval, code=1).stderr
    replaced = clipcid("eval-zeroshot", other, retrieval, "--overwrite", "--json").json
    assert not replaced["reused"]
    assert replaced["metrics"] != again[3]["metrics"]


def test_two_processes_and_other_workers_measure_the_same(
    clipcid: Clipcid, torchrun: Clipcid, tiny_model: Path, classification: Path, retrieval: Path, tmp_path: Path
) -> None:
    call = ("eval-zeroshot", tiny_model, classification, retrieval, "--batch-size", 4)
    clipcid(*call, "--work", "one")
    torchrun(2, *call, "--work", "two", "--workers", 1)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / work / "eval").glob("*.json")} for work in ("one", "two")
    )
    assert len(one) == 2
    assert one == two


def test_comparison_and_report(
    clipcid: Clipcid, tiny_model: Path, classification: Path, retrieval: Path, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    without = clipcid("eval-zeroshot", tiny_model, classification, "--json").json
    assert "predictions" not in without["files"]
    run = clipcid("eval-zeroshot", tiny_model, classification, retrieval, "--model", other, "--predictions", "--json")
    assert "has no predictions; measuring" in run.stderr
    results = run.json["results"]
    one = results[0]
    page = (tmp_path / run.json["files"]["report"]).read_text()
    assert "http" not in page.replace("http-equiv", "")
    for expected in ("things", "captions", "mean per class", "red thing", "data:image/webp;base64,", "misclassified"):
        assert expected in page
    assert all(one["prompts"][kind]["hash"] in page for kind in ("class_names", "templates"))
    table = pd.read_csv(tmp_path / run.json["files"]["table"])
    assert table["templates_hash"].tolist() == [one["prompts"]["templates"]["hash"], np.nan] * 2

    files = [result["files"]["metrics"] for result in results]
    # A model beside itself differs by nothing, whatever is drawn.
    same = clipcid("eval-zeroshot", "--compare", files[1], files[1]).said
    assert "image_retrieval_recall@1: no difference" in same
    # Folders of models in place of metrics files: the error names those.
    folders = clipcid("eval-zeroshot", "--compare", tiny_model, other, check=False).said
    assert "--compare takes two metrics files" in folders
    assert all(Path(file).name in folders for file in files[:2])
    assert Path(files[2]).name not in folders


def test_several_seeds_are_compared(clipcid: Clipcid, classification: Path, retrieval: Path, tmp_path: Path) -> None:
    names = ["a-1", "a-2", "a-10", "b-1", "b-2", "b-10"]
    models = [write_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(names)]
    others = [word for model in models[1:] for word in ("--model", model)]
    run = clipcid("eval-zeroshot", models[0], classification, retrieval, *others, "--predictions", "--json")
    results = {(one["task"], one["model"]): one for one in run.json["results"]}
    first, second = (f"clipcid-work/eval/things_{side}-*_classification.json" for side in "ab")
    told = clipcid("eval-zeroshot", "--compare", first, second, "--json")
    answer = told.json
    assert answer["models"] == [names[:3], names[3:]]  # 2 before 10
    assert [[Path(file).name for file in side] for side in answer["compared"]] == [
        [f"things_{name}_zeroshot_classification.json" for name in side] for side in answer["models"]
    ]
    judged = answer["differences"]["acc1"]
    values = [results["zeroshot_classification", name]["metrics"]["acc1"] for name in names]
    for side, of_side in (("first", values[:3]), ("second", values[3:])):
        assert judged[side]["values"] == pytest.approx(of_side, abs=1e-12)
        assert judged[side]["mean"] == pytest.approx(np.mean(of_side), abs=1e-12)
        assert judged[side]["std"] == pytest.approx(np.std(of_side, ddof=1), abs=1e-12)
    assert judged["difference"] == pytest.approx(np.mean(values[3:]) - np.mean(values[:3]), abs=1e-12)
    assert judged["interval"][0] <= judged["difference"] <= judged["interval"][1]
    assert judged["p_value"] is None
    assert all(sides["same"] for sides in answer["prompts"].values())

    # Lists with commas choose seeds, and their order; one file of each is compared as two results are.
    files = [f"clipcid-work/eval/captions_{name}_zeroshot_retrieval.json" for name in names]
    chosen = clipcid("eval-zeroshot", "--compare", ",".join(files[:2]), ",".join(files[4:2:-1]), "--json").json
    assert chosen["models"] == [["a-1", "a-2"], ["b-2", "b-1"]]
    for name, difference in chosen["differences"].items():
        assert not difference["real"]
        assert f"{name}: no verdict, 2 seeds of each are too few, give at least 3 (" in difference["verdict"]
        assert -1 <= difference["interval"][0] <= difference["interval"][1] <= 1
    of_one = clipcid("eval-zeroshot", "--compare", files[0], files[3].replace("b-1", "b-[1]"), "--json").json
    assert of_one == clipcid("eval-zeroshot", "--compare", files[0], files[3], "--json").json
    for sides, code, message in (
        ((first, files[0].replace("a-1_", "b-*_")), 1, "One result is of classification, the other of retrieval."),
        ((first, second.replace("b-*", "b-1*")), 1, "A has 3 metrics files and B has 2."),
        (files, 2, "6 were given. Give several seeds of each as two patterns in"),
    ):
        assert message in clipcid("eval-zeroshot", "--compare", *sides, code=code).said


def test_held_out_samples_by_default(clipcid: Clipcid, tiny_model: Path, tiny_shards: Path, tmp_path: Path) -> None:
    student = ("--teacher", "none", "--student", tiny_model / "open_clip_config.json", "--max-bad-fraction", 0.1)
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    write_tar(shards / "00002.tar", [("lost.txt", b"a caption without an image"), *shard_members(24, 1)])
    common = ("distill", shards, *student, "--steps", 2, "--batch-size", 4)
    trained = clipcid(*common, "--val-fraction", 0.3, "--name", "alone", "--json").json
    run = clipcid("eval-zeroshot", "--json")
    assert "newest student" in run.stderr
    assert "held out" in run.stderr
    assert 2 <= run.json["images"] < 25
    assert run.json["skipped"] == {}, "of the others, which were not held out, nothing is said"
    # The run itself measured its student on the same samples.
    for direction in ("image", "text"):
        measured = run.json["metrics"][f"{direction}_retrieval_recall@5"]
        assert measured == pytest.approx(trained["metrics"][f"{direction}_retrieval_recall@5"], abs=1e-9)
    clipcid("export")  # an export is measured as the student that it is of
    assert clipcid("eval-zeroshot", "clipcid-work/export/alone", "--json").json["metrics"] == run.json["metrics"]
    # A named student is measured on what its own run held out, with another on what both did.
    clipcid(*common, "--val-fraction", 0.5, "--name", "newer")
    alone, newer = ("clipcid-work/distill/alone/student", "clipcid-work/distill/newer/student")
    named = clipcid("eval-zeroshot", alone, "--json")
    assert f"the {run.json['images']} samples of" in named.said
    assert named.json["images"] == run.json["images"]
    both = clipcid("eval-zeroshot", newer, alone, "--json").json["results"]
    assert [each["images"] for each in both] == [run.json["images"]] * 2
    clipcid(common[0], f"{shards}/00000.tar", *common[2:], "--val-fraction", 0.5, "--name", "part")
    others = clipcid("eval-zeroshot", alone, "--model", "clipcid-work/distill/part/student", code=1)
    assert "trained on different data" in others.said
    folder = clipcid("eval-zeroshot", "clipcid-work/distill/alone", code=1)
    assert "Give clipcid-work/distill/alone/student." in folder.said
    clipcid(*common, "--val-fraction", 1e-9, "--name", "none")
    assert "clipcid-work/distill/none held out, and no data set was named" in clipcid("eval-zeroshot", code=1).said


def test_dropped_copies_are_not_held_out(clipcid: Clipcid, tiny_model: Path, tiny_shards: Path, tmp_path: Path) -> None:
    keys = [f"{number:06d}" for number in range(24)]
    pq.write_table(
        pa.table({"key": keys, "kept": [number % 2 == 0 for number in range(24)]}), tmp_path / "keep.parquet"
    )
    student = ("--teacher", "none", "--student", tiny_model / "open_clip_config.json", "--steps", 1, "--batch-size", 4)
    chosen = ("--val-fraction", 0.5, "--keep-list", "keep.parquet", "--name", "run", "--json")
    trained = clipcid("distill", tiny_shards, *student, *chosen).json
    held_out = [key for key in keys[::2] if key_fractions([key])[0] < 0.5]
    assert 2 <= len(held_out) < (key_fractions(keys) < 0.5).sum()
    recorded = tmp_path / "clipcid-work" / "distill" / "run" / "held_out.parquet"
    assert pq.read_table(recorded)["key"].to_pylist() == held_out
    run = clipcid("eval-zeroshot", "--json").json
    assert run["images"] == len(held_out)
    name = "image_retrieval_recall@5"
    assert run["metrics"][name] == pytest.approx(trained["metrics"][name], abs=1e-9)
    # Runs of earlier versions held out dropped samples too, and did not record which.
    recorded.unlink()
    earlier = clipcid("eval-zeroshot", "clipcid-work/distill/run/student", code=1)
    assert "earlier versions did not record what a run held out" in earlier.said


def test_prompts_live_side_by_side(clipcid: Clipcid, tiny_model: Path, classification: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("".join(f"{name}s\n" for name in CLASS_NAMES))
    calls = ([], ["--templates", "simple"], ["--templates", "openai"], ["--classnames", "names.txt"])
    results = [clipcid("eval-zeroshot", tiny_model, classification, *call, "--json").json for call in calls]
    stem = "things_tiny_zeroshot_classification"
    named = results[-1]["prompts"]["class_names"]["hash"]
    assert [Path(result["files"]["metrics"]).name for result in results] == [
        f"{stem}.json",
        f"{stem}_templates-simple.json",
        f"{stem}_templates-openai.json",
        f"{stem}_classnames-{named}.json",
    ]
    again = clipcid("eval-zeroshot", tiny_model, classification, *calls[1], "--json").json
    assert again["reused"]
    assert again["metrics"] == results[1]["metrics"]
