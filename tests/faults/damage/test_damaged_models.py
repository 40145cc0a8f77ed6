"""Models whose embeddings cannot be compared: refused, skipped, or scored as the guess that they are."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_clipcid, shard_members, write_tar, write_tiny_model
from safetensors.torch import load_file, save_file

from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.tokenizers import LONGEST_TEXT

CLASSES = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images with a caption each, of six classes."""
    folder = tmp_path_factory.mktemp("data")
    write_tar(folder / "0.tar", shard_members(0, 12, classes=CLASSES))
    (folder / "classnames.txt").write_text("".join(f"class {number}\n" for number in range(CLASSES)))
    return folder


def change_weights(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a model folder with changed weights."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    change(weights)
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def spoil(weights: dict[str, torch.Tensor]) -> None:
    weights["visual.conv1.weight"][0, 0, 0, 0] = torch.nan


def make_constant(weights: dict[str, torch.Tensor]) -> None:
    weights["visual.proj"].zero_()
    weights["text_projection"].zero_()


def test_weights_that_are_not_finite_are_refused_by_every_step(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    model = change_weights(tiny_model, tmp_path / "nan", spoil)
    steps = (
        ("eval-zeroshot", model, data, "--task", "retrieval"),
        ("eval-linear", model, "--train", data, "--test", data),
        ("embed", data, "--model", model),
        ("export", model, "--format", "open-clip"),
    )
    for arguments in steps:
        found = run_clipcid(*arguments, cwd=tmp_path, check=False)
        assert found.returncode == 1, found
        assert not found.problems(), found
        assert (
            f"Model {model} has weights that are not finite: 1 of the 6,144 entries of visual.conv1.weight."
            in found.stderr
        )
    assert not (tmp_path / "clipcid-work" / "eval").exists() or not list(
        (tmp_path / "clipcid-work/eval").glob("*.json")
    )


def test_constant_rows_score_as_a_guess(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    model = change_weights(tiny_model, tmp_path / "constant", make_constant)
    found = run_clipcid("eval-zeroshot", model, data, "--task", "classification", "--json", cwd=tmp_path)
    assert found.json["metrics"] == {
        "acc1": pytest.approx(1 / CLASSES),
        "acc5": pytest.approx(5 / CLASSES),
        "mean_per_class_recall": pytest.approx(1 / CLASSES),
    }
    assert "12 of 12 images are equally similar to several classes" in found.stderr
    captions = run_clipcid("eval-zeroshot", model, data, "--task", "retrieval", "--json", cwd=tmp_path)
    assert captions.json["metrics"]["image_retrieval_recall@1"] == pytest.approx(1 / 12)
    assert captions.json["metrics"]["text_retrieval_recall@1"] == pytest.approx(1 / 12)


def test_a_long_caption_is_tokenized_by_its_beginning_alone(tmp_path: Path) -> None:
    model = load_model(parse_model(str(write_tiny_model(tmp_path / "model"))))
    tokens = model.tokenizer(["\n" * 10_000_000, "a photo of a cat" + " and a dog" * 2_000_000])
    assert torch.equal(tokens[1], model.tokenizer(["a photo of a cat" + " and a dog" * 20])[0])
    assert torch.equal(tokens[0], model.tokenizer([""])[0])
    assert LONGEST_TEXT >= 100 * 77
