"""`clipcid eval-linear` from the command line: metrics against scikit-learn, the feature cache, data forms, errors."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Clipcid, shard_members, write_benchmark, write_tar, write_tiny_model
from PIL import Image
from sidecars import make_sidecar
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from clipcid_cli.formats.results.run_folder import DistillSidecar

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "grey": (120, 120, 120), "red": (210, 50, 40)}


def draw(colour: tuple[int, int, int], seed: int) -> bytes:
    """Draw noise around a colour, strong enough that classes overlap."""
    random = np.random.default_rng(seed)
    shade = np.array(colour) + random.normal(scale=45, size=3)
    pixels = shade + random.normal(scale=60, size=(32, 32, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_split(folder: Path, per_class: int, seed: int, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for image in range(per_class):
            (folder / name / f"{image}.png").write_bytes(draw(COLOURS[name], seed + 1000 * number + image))
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/, one folder of images per class; treat it as read-only."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    write_split(folder / "train", 24, 0)
    # Without one class, so that numbers of folders differ from those of the training split.
    write_split(folder / "test", 12, 50_000, ("blue", "grey", "red"))
    return folder


def read_features(work: Path, images: int) -> tuple[np.ndarray, np.ndarray]:
    for path in (work / "features").glob("*.npz"):
        with np.load(path) as file:
            if len(file["rows"]) == images:
                return file["rows"].astype(np.float64), file["labels"]
    raise AssertionError(f"no features of {images} images in {work}")


def test_metrics_are_those_of_scikit_learn(clipcid: Clipcid, tiny_model: Path, colours: Path) -> None:
    run = clipcid("eval-linear", tiny_model, colours, "--json")
    result, work = run.json, run.cwd / "clipcid-work"
    assert (result["task"], result["dataset"]) == ("linear_probe", "colours")
    assert (result["images"], result["train_images"], result["classes"]) == (36, 96, 4)
    rows, labels = read_features(work, 96)
    test_rows, test_labels = read_features(work, 36)
    assert set(test_labels.tolist()) == {0, 2, 3}
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    theirs = LogisticRegression(C=result["c"], tol=1e-8, max_iter=10_000).fit(rows, labels)
    right = theirs.predict(test_rows) == test_labels
    recalls = [right[test_labels == label].mean() for label in (0, 2, 3)]
    expected = {"lp_acc1": right.mean(), "lp_acc5": None, "lp_mean_per_class_recall": np.mean(recalls)}
    assert result["metrics"] == {name: value and pytest.approx(value) for name, value in expected.items()}
    assert right.mean() > 0.5
    assert result["chance"] == {"lp_acc1": 0.25, "lp_mean_per_class_recall": 0.25}
    assert result["majority"] == 12 / 36
    drawn = np.random.default_rng(0).choice(right, (4000, 36)).mean(axis=1)
    assert result["intervals"]["lp_acc1"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    assert set(result["intervals"]) == {"lp_acc1", "lp_mean_per_class_recall"}
    shown = clipcid("eval-linear", tiny_model, colours).said
    assert "chance acc1 25.0%, per class 25.0%; always the largest class: acc1 33.3% measured on" in shown
    assert f"(95% interval {100 * result['intervals']['lp_acc1'][0]:.2f} … " in shown

    name = "colours_tiny_linear_probe.json"
    written = json.loads((work / "eval" / name).read_text())
    assert set(written) == {"dataset", "model", "pretrained", "task", "language", "metrics"}
    assert written["metrics"] == result["metrics"]
    assert sorted(path.name for path in (work / "eval").iterdir()) == [name, "sidecars"]
    sidecar = json.loads((work / "eval" / "sidecars" / name).read_text())
    assert sidecar["solution"]["converged"]
    assert sidecar["solution"]["gradient_norm"] <= 1e-6
    scores = {point["c"]: point["validation_score"] for point in sidecar["sweep"]}
    assert len(scores) == 45
    best = max(scores.values())
    assert (result["metric"], result["validation_score"]) == ("acc1", best)
    assert result["c"] == min(c for c, score in scores.items() if score == best)
    assert clipcid("eval-linear", tiny_model, colours, "--json").json == result | {"reused": True}
    planned = clipcid("eval-linear", tiny_model, colours, "--dry-run").said
    assert f"{name} already holds" in planned
    assert "Would reuse a linear probe" in planned
    assert "Would fit" not in planned

    # Features that no model makes are not believed.
    for path in (work / "features").glob("*.npz"):
        with np.load(path) as file:
            np.savez(path, **dict(file) | {"rows": np.zeros_like(file["rows"])})
    shutil.rmtree(work / "eval")
    again = clipcid("eval-linear", tiny_model, colours, "--json")
    assert "is damaged: the features of colours train are computed again" in again.said
    assert again.json["metrics"] == result["metrics"]
    check_shots(clipcid, result, [tiny_model, colours, "--shots", "19,1", "--shot-repeats", 3, "--knn", "20,3"])


def check_shots(clipcid: Clipcid, plain: dict[str, Any], arguments: list[object]) -> None:
    """Few-shot probes and nearest neighbours of the same model and data, beside the probe that was fitted already."""
    run = clipcid("eval-linear", *arguments, "--json")
    result, work = run.json, run.cwd / "clipcid-work"
    # The features and the probe are those of the run without.
    assert "features of 96 images from" in run.said
    of_neighbours = {name: value for name, value in result["metrics"].items() if name.startswith("knn")}
    assert result["metrics"] == plain["metrics"] | of_neighbours
    vote = KNeighborsClassifier(3, weights=lambda far: np.exp((1 - far) / 0.07), metric="cosine", algorithm="brute")
    rows, labels = read_features(work, 36)
    right = vote.fit(*read_features(work, 96)).predict(rows) == labels
    assert of_neighbours["knn3_acc1"] == pytest.approx(right.mean(), abs=1e-6)
    assert list(of_neighbours) == [
        f"knn{k}_{name}" for k in (3, 20) for name in ("acc1", "acc5", "mean_per_class_recall")
    ]
    assert [(point["shots"], point["images"]) for point in result["shots"]] == [(1, 4), (19, 76)]
    for point in result["shots"]:
        accuracy = point["metrics"]["lp_acc1"]
        assert len(accuracy["values"]) == len(point["c"]) == 3
        assert accuracy["mean"] == pytest.approx(np.mean(accuracy["values"]))
        assert accuracy["std"] == pytest.approx(np.std(accuracy["values"], ddof=1))
        assert point["metrics"]["lp_acc5"] == {"mean": None, "std": None, "values": [None] * 3}
    first, last = (point["metrics"]["lp_acc1"] for point in result["shots"])
    assert first["mean"] < last["mean"]
    # 24 images of each class, a fifth held out: 19 are all there are, and every draw is the same.
    assert last["std"] == 0
    assert first["std"] > 0


def test_features_are_kept_while_valid(clipcid: Clipcid, tiny_model: Path, colours: Path, tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "colours"
    shutil.copytree(tiny_model, model)
    shutil.copytree(colours, data)

    def evaluate(*flags: object) -> list[str]:
        """Run anew and tell which splits' features were taken from before."""
        shutil.rmtree(tmp_path / "clipcid-work" / "eval", ignore_errors=True)
        told = clipcid("eval-linear", model, data, "--val-fraction", 0.2, *flags).said  # five folds take longer
        return [split for split, count in (("train", 96), ("test", 36)) if f"features of {count} images from" in told]

    assert evaluate() == []
    # Another image of the same name and size.
    path = data / "test" / "grey" / "3.png"
    size = path.stat().st_size
    path.write_bytes(draw(COLOURS["red"], 1)[:size].ljust(size, b"\0"))
    assert evaluate() == ["train"]

    config = model / "open_clip_config.json"
    changed = json.loads(config.read_text())
    for part, entry, value in (("preprocess_cfg", "mean", [0.4] * 3), ("model_cfg", "quick_gelu", True)):
        changed[part][entry] = value
        config.write_text(json.dumps(changed))
        assert evaluate() == []

    write_tiny_model(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "open_clip_model.safetensors", model / "open_clip_model.safetensors")
    assert evaluate() == []
    assert evaluate() == ["train", "test"]
    # A limit is one of each run, also where nothing is read again.
    for number in range(3):
        (data / "train" / "grey" / f"{number}.png").write_bytes(b"no image")
    assert evaluate("--max-bad-fraction", 0.5) == ["test"]
    (skipped,) = (tmp_path / "clipcid-work" / "eval" / "sidecars").glob("*.skipped.parquet")
    listed = [(f"grey/{number}", "00000", "unreadable_image") for number in range(3)]
    assert [tuple(row.values()) for row in pq.read_table(skipped).to_pylist()] == listed
    shutil.rmtree(tmp_path / "clipcid-work" / "eval")
    # Also of features that are there.
    again = clipcid("eval-linear", model, data, "--max-bad-fraction", 0.5, "--json").json
    assert pq.read_table(again["files"]["skipped"]).num_rows == 3
    shutil.rmtree(tmp_path / "clipcid-work" / "eval")
    refused = clipcid("eval-linear", model, data, code=1).said
    assert "features of 93 images from" in refused
    assert "3 of 96 samples in" in refused


def test_splits_are_named_in_any_form(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 24), ("c", 36)):
        write_tar(tmp_path / f"{name}.tar", shard_members(first, 24, classes=3))
    run = clipcid("eval-linear", tiny_model, "--train", "a.tar::b.tar", "--test", "pipe:cat c.tar", "--json")
    assert [run.json[f"{split}images"] for split in ("train_", "", "repeated_")] == [48, 24, 12]
    assert "12 of 24 test images are among those of training too" in run.said
    # Another training set of the same test set is another result.
    planned = clipcid("eval-linear", tiny_model, "--train", "a.tar", "--test", "pipe:cat c.tar", "--dry-run", "--json")
    names = [Path(answer["files"]["metrics"]).stem.partition("_linear_probe")[2] for answer in (run.json, planned.json)]
    assert names == ["_train-a.tar-b.tar", "_train-a.tar"]
    for split, data in (("train", "none.tar"), ("test", f"pipe:cat {300 * 'x'}")):
        given = {"train": "a.tar", "test": "c.tar"} | {split: data}
        refused = clipcid("eval-linear", tiny_model, "--train", given["train"], "--test", given["test"], code=1)
        assert "Error: " in refused.stderr


def several_classes(folder: Path, split: str, count: int, seed: int) -> Path:
    """Write one image of two colours for each sample, and a vector of which, as CLIP_benchmark's multi-label data is."""
    random, members = np.random.default_rng(seed), list[tuple[str, bytes]]()
    for number in range(count):
        chosen = random.choice(4, 2, replace=False)
        pixels = np.concatenate(
            [np.full((16, 32, 3), list(COLOURS.values())[place]) + random.normal(scale=50, size=3) for place in chosen]
        )
        buffer = io.BytesIO()
        noisy = pixels + random.normal(scale=60, size=pixels.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
        vector = io.BytesIO()
        np.save(vector, np.isin(np.arange(4), chosen).astype(np.int64))
        members += [(f"{number:03d}.png", buffer.getvalue()), (f"{number:03d}.npy", vector.getvalue())]
    return write_benchmark(folder, split, members)


def test_an_image_may_have_several_classes(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "wds_voc2007_multilabel"
    for split, count in (("train", 120), ("test", 60)):
        several_classes(data, split, count, count)
    (data / "dataset_type.txt").write_text("multilabel")
    run = clipcid("eval-linear", tiny_model, data, "--shots", "2,8", "--shot-repeats", 2, "--json")
    result, work = run.json, run.cwd / "clipcid-work"
    # VOC2007 is reported by eleven points; C is chosen by what is reported.
    assert result["metric"] == "mean_average_precision_11_point"
    assert set(result["metrics"]) == {"lp_mean_average_precision", "lp_mean_average_precision_11_point"}
    _, labels = read_features(work, 120)
    assert labels.dtype == bool
    assert (labels.sum(axis=1) == 2).all()
    assert result["metrics"]["lp_mean_average_precision"] > 0.55
    assert [point["shots"] for point in result["shots"]] == [2, 8]
    assert "an image has several classes" in clipcid("eval-linear", tiny_model, data, "--metric", "acc1", code=2).said


def test_two_processes_measure_what_one_does(
    clipcid: Clipcid, torchrun: Clipcid, tiny_model: Path, colours: Path, tmp_path: Path
) -> None:
    arguments = ["eval-linear", tiny_model, colours, "--json", "--batch-size", 16, "--workers", 0]
    one = clipcid(*arguments, "--work", tmp_path / "one").json
    two = torchrun(2, *arguments, "--work", tmp_path / "two").json
    assert two["metrics"] == one["metrics"]
    assert two["c"] == one["c"]


def test_benchmark_shards_and_the_newest_student(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    for split, count in (("train", 40), ("test", 20), ("val", 12)):
        members: list[tuple[str, bytes]] = []
        for number in range(count):
            name = list(COLOURS)[number % 4]
            members.append((f"{number:03d}.png", draw(COLOURS[name], number + 30_000 * count)))
            members.append((f"{number:03d}.cls", str(number % 4).encode()))
        write_benchmark(tmp_path / "bench", split, members)
    run = tmp_path / "clipcid-work" / "distill" / "first"
    shutil.copytree(tiny_model, run / "student")
    (run / "distill.json").write_text(json.dumps(make_sidecar(DistillSidecar)))
    arguments = ["--train", tmp_path / "bench" / "train", "--test", tmp_path / "bench" / "test"]
    result = clipcid("eval-linear", *arguments, "--json")
    assert result.json["dataset"] == "bench"
    assert (result.json["train_images"], result.json["images"]) == (40, 20)
    assert (result.json["folds"], result.json["validation_images"]) == (5, 40)
    # A validation split of its own: all of --train is fitted, and both are at last.
    own = clipcid("eval-linear", *arguments, "--val", tmp_path / "bench" / "val", "--overwrite", "--json").json
    assert (own["train_images"], own["validation_images"], own["images"]) == (52, 12, 20)
    assert own["folds"] == 1
    assert set(own["skipped"]) == {"train", "test", "val"}
    assert "newest student" in result.stderr
