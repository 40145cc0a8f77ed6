"""What an export is compared on, and the gate of what quantisation may cost."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import make_image
from PIL import Image

from clipcid_cli.algorithms.parity import Difference
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.dataset import open_dataset
from clipcid_cli.runtime.encoder import ClipModel, load_model
from clipcid_cli.runtime.model_names import parse_model
from clipcid_cli.steps.export_check import Checker
from clipcid_cli.steps.export_classes import Classes, label_samples
from clipcid_cli.steps.parity_inputs import ParityInputs, make_parity_inputs
from clipcid_cli.steps.reporting import SilentReporter
from clipcid_cli.steps.settings.export import ExportSettings


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images each of three classes, in folders called a_cat, b_dog and c_cow."""
    folder = tmp_path_factory.mktemp("drawings")
    for number in range(36):
        place = folder / ("a_cat", "b_dog", "c_cow")[number // 12]
        place.mkdir(exist_ok=True)
        Image.open(io.BytesIO(make_image(number))).save(place / f"{number}.png")
    return folder


def collect(model: ClipModel, data: Path, names: Sequence[str] | None = None, count: int | None = None) -> ParityInputs:
    classes = None if names is None else Classes(tuple(names), ("a {c}",), ())
    return make_parity_inputs(model, ExportSettings(data=str(data), check_images=count), classes, SilentReporter())


def test_a_loss_over_the_limit_is_an_error_that_says_by_how_much(model: ClipModel, drawings: Path) -> None:
    inputs = collect(model, drawings)
    checker = Checker(model, inputs, None, 0.05)
    candidates, top = inputs.candidates, checker.reference.top
    assert candidates is not None
    assert top is not None
    right = top == candidates.labels
    assert right.any()
    worse = torch.where(right, (top + 1) % 3, top)
    share = float(right.double().mean())
    said = (
        rf"onnx-int8: acc1 falls from {share:.4f} to 0.0000 on 36 images, by {100 * share:.2f} points \(allowed 5.00\)"
    )
    with pytest.raises(ClipcidError, match=said):
        checker.compare_answers("onnx-int8", worse, gated=True)
    found = checker.compare_answers("onnx", worse, gated=False)
    assert found is not None
    assert found["drop"] == pytest.approx(share)
    assert found["agreement"] == pytest.approx(1 - share)
    # A gain is no loss.
    assert checker.compare_answers("onnx-int8", candidates.labels, gated=True) is not None


def test_rows_that_are_no_numbers_pass_no_limit(model: ClipModel, drawings: Path) -> None:
    checker = Checker(model, collect(model, drawings), 1.0, 1.0)
    broken = Difference(max_difference=float("inf"), min_cosine=-1.0)
    for kind in ("fp32", "fp16", "int8"):
        with pytest.raises(ClipcidError, match="Nothing was written"):
            checker.require_close("the image encoder", kind, broken)


def test_few_images_are_taken_from_all_classes(model: ClipModel, drawings: Path) -> None:
    inputs = collect(model, drawings, count=18)
    assert inputs.candidates is not None
    assert torch.bincount(inputs.candidates.labels).tolist() == [6, 6, 6]
    assert inputs.candidates.prompts[1] == ("a photo of a b dog.",)


def test_labels_follow_the_names_of_the_folders(drawings: Path) -> None:
    dataset = open_dataset(drawings)
    samples = [sample for shard in dataset.shards for sample in shard.samples()]

    def labels(*names: str) -> list[int]:
        found = label_samples(samples, dataset, None, Classes(names, ("{}",), ()))
        assert found is not None
        return torch.unique_consecutive(found[1]).tolist()

    assert labels("c cow", "A cat", "b dog") == [1, 2, 0]  # the same names in another order
    assert labels("Katze", "Hund", "Kuh") == [0, 1, 2]  # other names stand for the folders in their order
    with pytest.raises(ClipcidError, match=r"has class 2, and there are 2 class names \(0 … 1\)"):
        labels("Katze", "Hund")


def test_captions_are_candidates_where_there_are_no_classes(model: ClipModel, tiny_shards: Path) -> None:
    inputs = collect(model, tiny_shards)
    assert inputs.candidates is not None
    assert inputs.candidates.measure == "text_retrieval_recall@1"
    assert len(inputs.candidates.prompts) == len(inputs.candidates.labels) == 24
