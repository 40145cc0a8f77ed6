"""`export` through the real binary; what it writes is read by open_clip and ONNX Runtime, which do not know clipcid."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
from conftest import TINY_CONFIG, Run, make_caption, make_image, write_tiny_model
from PIL import Image
from safetensors.torch import load_file

QUICK_GELU = {**TINY_CONFIG, "quick_gelu": True}


@pytest.fixture(scope="module")
def quick_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activation a folder must carry along: QuickGELU."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "quick", QUICK_GELU, seed=3)


def test_every_form_computes_what_the_model_does(
    clipcid: Callable[..., Run], quick_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    result = clipcid(
        "export", quick_model, "--format", "open-clip", "--format", "onnx", "--data", tiny_shards, "--json"
    ).json
    folder = tmp_path / "clipcid-work" / "export" / "quick"
    assert sorted(name for name in os.listdir(folder) if not name.startswith(".")) == [
        "export.json", "image_encoder.onnx", "open_clip_config.json", "open_clip_model.safetensors", "parity.json",
        "text_encoder.onnx",
    ]  # fmt: skip
    assert all((tmp_path / path).is_file() for path in result["files"].values())

    # Other images and texts than those export compared on, at a batch size it did not try.
    images = [Image.open(io.BytesIO(make_image(number))) for number in range(50, 57)]
    texts = [make_caption(number) for number in range(50, 57)]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{quick_model}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{quick_model}")
    model.eval()
    pixels, tokens = torch.stack([transform(image) for image in images]), tokenizer(texts)
    with torch.no_grad():
        expected = {
            "image": model.encode_image(pixels, normalize=True).numpy(),
            "text": model.encode_text(tokens, normalize=True).numpy(),
        }

    for tower, feed in (("image", {"pixel_values": pixels.numpy()}), ("text", {"input_ids": tokens.numpy()})):
        session = onnxruntime.InferenceSession(folder / f"{tower}_encoder.onnx", providers=["CPUExecutionProvider"])
        (rows,) = session.run([f"{tower}_embeds"], feed)
        np.testing.assert_allclose(rows, expected[tower], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)

    script = f"""
import sys, torch, open_clip
model, _, _ = open_clip.create_model_and_transforms("local-dir:{folder}")
model.eval()
with torch.no_grad():
    rows = model.encode_image(torch.load(sys.argv[1], weights_only=True), normalize=True)
torch.save(rows, sys.argv[2])
assert not any(name.startswith("clipcid") for name in sys.modules)
"""
    torch.save(pixels, tmp_path / "pixels.pt")
    subprocess.run([sys.executable, "-c", script, tmp_path / "pixels.pt", tmp_path / "rows.pt"], check=True)
    rows = torch.load(tmp_path / "rows.pt", weights_only=True)
    np.testing.assert_array_equal(rows.numpy(), expected["image"])

    graph = onnx.load(folder / "image_encoder.onnx")
    onnx.checker.check_model(graph)
    assert {opset.domain: opset.version for opset in graph.opset_import} == {"": 20}
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["preprocess"])["size"] == [32, 32]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param

    parity = json.loads((folder / "parity.json").read_text())
    assert parity["parity"] == result["parity"]
    assert parity["reference"]["inputs"] == str(tiny_shards)
    for form in ("open-clip", "onnx"):
        for tower in ("image", "text"):
            assert parity["parity"][form][tower]["batch_sizes"] == [1, 2, 5, 16]
            assert parity["parity"][form][tower]["min_cosine"] > 0.99999
    assert parity["parity"]["onnx"]["image"]["opset"] == 20

    again = clipcid("export", quick_model, "--format", "open-clip", "--format", "onnx", "--data", tiny_shards, "--json")
    assert "holds this export already" in again.stderr
    assert again.json["parity"] == result["parity"]


def test_half_precision_halves_the_file_and_is_measured(
    clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    result = clipcid("export", tiny_model, "--precision", "fp16", "--out", "half", "--json").json
    weights = load_file(tmp_path / "half" / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    assert 0 < result["parity"]["open-clip"]["image"]["max_difference"] < 5e-3


def test_over_tolerance_nothing_is_written(clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path) -> None:
    call = ("export", tiny_model, "--precision", "fp16", "--max-difference", "1e-7", "--out", "half")
    run = clipcid(*call, check=False)
    assert run.returncode == 1
    assert "differs from" in run.stderr
    assert "allowed 1e-07" in run.stderr
    assert "Traceback" not in run.stderr
    assert [name for name in os.listdir(tmp_path / "half") if not name.startswith(".export")] == []


def test_another_form_in_the_same_folder_needs_overwrite(
    clipcid: Callable[..., Run], torchrun: Callable[..., Run], tiny_model: Path, tmp_path: Path
) -> None:
    clipcid("export", tiny_model, "--out", "here")
    refused = clipcid("export", tiny_model, "--out", "here", "--format", "onnx", check=False)
    assert refused.returncode == 1
    assert "settings.format" in refused.stderr
    torchrun(2, "export", tiny_model, "--out", "here", "--format", "onnx", "--overwrite")
    names = {name for name in os.listdir(tmp_path / "here") if not name.startswith(".")}
    assert names == {"export.json", "image_encoder.onnx", "text_encoder.onnx", "parity.json"}


def test_files_of_others_are_not_replaced(clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path) -> None:
    for name in ("open_clip_config.json", "tokenizer.json"):
        other = tmp_path / name.split(".")[0] / name
        other.parent.mkdir()
        other.write_bytes(b"precious")
        run = clipcid("export", tiny_model, "--out", other.parent, "--overwrite", check=False)
        assert run.returncode == 1
        assert f"did not write and would replace: {name}" in " ".join(run.stderr.split())
        assert "--out" in run.stderr
        assert os.listdir(other.parent) == [name]
        assert other.read_bytes() == b"precious"
    # What goes beside them is welcome.
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "notes.txt").write_bytes(b"precious")
    clipcid("export", tiny_model, "--out", "beside")
    assert (tmp_path / "beside" / "notes.txt").read_bytes() == b"precious"


def test_a_model_is_not_written_over_itself(clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path) -> None:
    clipcid("export", tiny_model, "--out", "here")
    before = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    (tmp_path / "link").symlink_to("here")
    run = clipcid("export", "link", "--format", "onnx", "--out", "here", "--overwrite", check=False)
    assert run.returncode == 1
    assert "Model link is the folder here" in " ".join(run.stderr.split())
    assert "Give another folder with --out" in " ".join(run.stderr.split())
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "No model was named"),
        (["nowhere/model"], 1, "no architecture nowhere-model"),
        (["empty"], 1, "has no open_clip_config.json"),
        (["damaged"], 1, "could not be loaded"),
        (["MODEL", "--data", "nowhere"], 1, "There is no data at"),
        (["MODEL", "--format", "tflite"], 2, "'tflite' is not one of"),
        (["MODEL", "--format", "onnx", "--format", "onnx"], 2, "given twice"),
        (["MODEL", "--format", "onnx", "--precision", "fp16"], 2, "does not go with --format onnx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_error(
    clipcid: Callable[..., Run], tiny_model: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    for path in tiny_model.iterdir():
        (tmp_path / "damaged" / path.name).write_bytes(path.read_bytes()[:2000])
    run = clipcid("export", *[tiny_model if word == "MODEL" else word for word in arguments], check=False)
    assert run.returncode == code, run
    assert message in " ".join(run.stderr.split()), run
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.glob("clipcid-work/export/*/[!.]*"))


def test_missing_onnx_names_the_extra(tiny_model: Path, tmp_path: Path) -> None:
    # The packages are hidden from a real process, as on a machine where the extra was not installed.
    script = (
        "import sys; sys.modules.update(onnx=None, onnxscript=None, onnxruntime=None)\n"
        f"from clipcid_cli.cli import main; main(['export', {str(tiny_model)!r}, '--format', 'onnx'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'clipcid[export]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "clipcid-work").exists()
