"""Export: each form computes what the model does, by the programs it is made for."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from golden import QUICKSTART, Arrays, ask, check, make_place, plain
from PIL import Image

TEXTS = ("a red apple", "two dogs, running", "the flag of Japan", "an umbrella in the rain")
NUM_IMAGES = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def exported(place: Path) -> Any:
    """The answer of exporting the teacher to all forms at once, into the folder ``out``."""
    forms = [word for form in ("open-clip", "hf", "onnx") for word in ("--format", form)]
    checked = ("--data", "data/classification", "--classnames", "data/classification", "--check-images", 200)
    quantized = ("--quantize", "int8", "--max-accuracy-drop", 0.05)
    return ask(place, "export", "teacher", *forms, *checked, *quantized, "--out", "out", "--work", "work")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """The first images of the test split, on white."""
    with tarfile.open(QUICKSTART / "data" / "classification" / "test" / "0.tar") as archive:
        names = [name for name in archive.getnames() if name.endswith(".webp")][:NUM_IMAGES]
        files = [archive.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    images = []
    for data in files:
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
        images.append(Image.new("RGB", picture.size, "white"))
        images[-1].paste(picture, mask=picture)
    return images


@pytest.fixture(scope="module")
def inputs(images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and tokens as open_clip makes them for the teacher."""
    folder = f"local-dir:{QUICKSTART / 'teacher'}"
    transform = open_clip.create_model_and_transforms(folder)[2]
    return torch.stack([transform(image) for image in images]), open_clip.get_tokenizer(folder)(list(TEXTS))


def embed(folder: Path, inputs: tuple[torch.Tensor, torch.Tensor]) -> Arrays:
    model = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
    with torch.no_grad():
        rows = model.encode_image(inputs[0], normalize=True), model.encode_text(inputs[1], normalize=True)
    return {"image": rows[0].numpy(), "text": rows[1].numpy()}


@pytest.fixture(scope="module")
def expected(inputs: tuple[torch.Tensor, torch.Tensor]) -> Arrays:
    """Rows of the teacher itself, by open_clip."""
    return embed(QUICKSTART / "teacher", inputs)


def assert_near(found: Arrays, expected: Arrays, cosine: float = 0.99999) -> None:
    for tower, rows in expected.items():
        own = found[tower] / np.linalg.norm(found[tower], axis=1, keepdims=True)
        assert (own * rows).sum(axis=1).min() >= cosine, tower


def test_the_answer(exported: Any) -> None:
    parity = {form: sorted(found) for form, found in exported["parity"].items()}
    assert exported["parity"]["onnx-int8"]["zeroshot"]["drop"] <= 0.05
    check("export", {"json": plain(exported) | {"parity": parity}})


def test_open_clip(place: Path, exported: Any, inputs: Any, expected: Arrays) -> None:
    assert_near(embed(place / "out", inputs), expected)


def test_hugging_face(place: Path, exported: Any, images: list[Image.Image], expected: Arrays) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(place / "out").eval()
        processor = CLIPProcessor.from_pretrained(place / "out")
        given = processor(text=list(TEXTS), images=images, return_tensors="pt", padding="max_length")
        with torch.no_grad():
            found = model(**given)
    assert_near({"image": found.image_embeds.numpy(), "text": found.text_embeds.numpy()}, expected)


@pytest.mark.parametrize(("suffix", "cosine"), [("", 0.99999), ("_int8", 0.99)])
def test_onnx(place: Path, exported: Any, inputs: Any, expected: Arrays, suffix: str, cosine: float) -> None:
    found = {}
    for tower, name, values in (("image", "pixel_values", inputs[0]), ("text", "input_ids", inputs[1])):
        session = onnxruntime.InferenceSession(place / "out" / f"{tower}_encoder{suffix}.onnx")
        (found[tower],) = session.run([f"{tower}_embeds"], {name: values.numpy()})
    assert_near(found, expected, cosine)


def test_classifier(place: Path, exported: Any, images: list[Image.Image], expected: Arrays) -> None:
    """From the bytes of an image to the cosines with the prompts of each class."""
    data = QUICKSTART / "data" / "classification"
    names = (data / "classnames.txt").read_text().splitlines()
    (template,) = (data / "zeroshot_classification_templates.txt").read_text().splitlines()
    folder = f"local-dir:{QUICKSTART / 'teacher'}"
    tokens = open_clip.get_tokenizer(folder)([template.replace("{c}", name) for name in names])
    model = open_clip.create_model_and_transforms(folder)[0].eval()
    with torch.no_grad():
        classes = model.encode_text(tokens, normalize=True).numpy()
        scale = float(model.logit_scale.exp())
    session = onnxruntime.InferenceSession(place / "out" / "classifier.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == names
    (logits,) = session.run(["logits"], {"image": np.stack([np.asarray(image) for image in images[:1]])})
    np.testing.assert_allclose(logits / scale, expected["image"][:1] @ classes.T, atol=1e-4)
