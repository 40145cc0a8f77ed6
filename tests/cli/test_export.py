"""`export` from the command line; what it writes is read by open_clip, transformers and ONNX Runtime by themselves."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
from conftest import TINY_CONFIG, Clipcid, make_caption, make_image, write_tiny_model
from PIL import Image
from safetensors.torch import load_file

import clipcid_cli

QUICK_GELU = {**TINY_CONFIG, "quick_gelu": True}
# Both encoders, and with them all that transformers.js asks for.
ONNX = ("image_encoder.onnx", "text_encoder.onnx", "onnx", "config.json", "preprocessor_config.json", "tokenizer.json")
ONNX += ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


@pytest.fixture(scope="module")
def quick_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose activation a folder must carry along: QuickGELU."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "quick", QUICK_GELU, seed=3)


def test_every_form_computes_what_the_model_does(
    binary: Clipcid, clipcid: Clipcid, quick_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    call = ("export", quick_model, "--format", "open-clip", "--format", "onnx", "--data", tiny_shards, "--json")
    result = binary(*call).json
    folder = tmp_path / "clipcid-work" / "export" / "quick"
    names = ["README.md", "export.json", "open_clip_config.json", "open_clip_model.safetensors", "parity.json"]
    assert sorted(os.listdir(folder)) == sorted([*names, *ONNX]), "nothing of the run is left in what is exported"
    # What transformers.js loads takes no space of its own.
    for ours, theirs in (("image_encoder", "vision_model"), ("text_encoder", "text_model")):
        assert (folder / f"{ours}.onnx").samefile(folder / "onnx" / f"{theirs}.onnx")
    assert json.loads((folder / "config.json").read_text())["text_config"]["hidden_act"] == "quick_gelu"
    assert all((tmp_path / path).is_file() for path in result["files"].values())

    # Other images and texts than those export compared on, at a batch size it did not try.
    images = [Image.open(io.BytesIO(make_image(number))) for number in range(50, 57)]
    texts = [make_caption(number) for number in range(50, 57)]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{quick_model}")
    pixels = torch.stack([transform(image) for image in images])
    tokens = open_clip.get_tokenizer(f"local-dir:{quick_model}")(texts)
    with torch.no_grad():
        image_rows = model.eval().encode_image(pixels, normalize=True).numpy()
        text_rows = model.encode_text(tokens, normalize=True).numpy()
    for tower, given, expected in (
        ("image", {"pixel_values": pixels.numpy()}, image_rows),
        ("text", {"input_ids": tokens.numpy()}, text_rows),
    ):
        session = onnxruntime.InferenceSession(folder / f"{tower}_encoder.onnx", providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run([f"{tower}_embeds"], given)[0], expected, atol=1e-5)
    written, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        np.testing.assert_array_equal(written.eval().encode_image(pixels, normalize=True).numpy(), image_rows)

    graph = onnx.load(folder / "image_encoder.onnx")
    onnx.checker.check_model(graph)
    assert {opset.domain: opset.version for opset in graph.opset_import} == {"": 20}
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["preprocess"])["size"] == [32, 32]
    package = str(Path(clipcid_cli.__file__).parent).encode()
    assert package not in (folder / "image_encoder.onnx").read_bytes(), "the file must not name paths of its machine"

    parity = json.loads((folder / "parity.json").read_text())
    assert parity["parity"] == result["parity"]
    assert parity["reference"]["inputs"] == str(tiny_shards)
    for form in ("open-clip", "onnx"):
        for tower in ("image", "text"):
            assert parity["parity"][form][tower]["batch_sizes"] == [1, 2, 5, 16]
            assert parity["parity"][form][tower]["min_cosine"] > 0.99999
    assert parity["parity"]["onnx"]["tokenizer"]["same"] == parity["parity"]["onnx"]["tokenizer"]["texts"]
    for found in (parity["reference"], *parity["parity"].values()):
        assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p95"]
    photo = images[0].resize((90, 131))  # the longer side is rounded to that of the model
    photo.save(tmp_path / "photo.png")
    page = Path(clipcid_cli.__file__).parent / "docs" / "export.md"
    arguments = (folder, tmp_path / "photo.png", *texts)
    printed = run_example(page, "Tokenizer.from_file", *arguments, uses={"PIL", "tokenizers"}, cwd=tmp_path)
    with torch.no_grad():
        shown = model.encode_image(transform(photo)[None], normalize=True)[0].numpy()
    np.testing.assert_allclose(json.loads(printed[0]), text_rows @ shown, atol=1e-4)
    answers = parity["parity"]["onnx"]["zeroshot"]
    assert (answers["measure"], answers["images"]) == ("text_retrieval_recall@1", 24)
    assert answers["agreement"] == 1

    again = clipcid(*call)
    assert "already holds this export" in again.stderr
    assert again.json["parity"] == result["parity"]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in one folder per class, none square, in three sizes of which one is cropped aside by transformers."""
    folder = tmp_path_factory.mktemp("drawings")
    for number in range(24):
        place = folder / ("red_square", "blue_circle", "green_line")[number % 3]
        place.mkdir(exist_ok=True)
        size = ((60, 41), (41, 60), (128, 140))[number % 3]
        Image.open(io.BytesIO(make_image(number, 64))).resize(size).save(place / f"{number:03d}.png")
    return folder


def test_forms_for_other_programs(clipcid: Clipcid, quick_model: Path, drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("green line\nred square\nblue circle\n")
    (tmp_path / "templates.txt").write_text("a {c}\na drawing of a {}.\n")
    call = ["export", quick_model, "--format", "hf", "--format", "onnx", "--out", "all", "--data", drawings]
    call += ["--classnames", "names.txt", "--templates", "templates.txt", "--dense", "--license", "cc0-1.0"]
    run = clipcid(*call, "--quantize", "fp16", "--quantize", "int8", "--max-accuracy-drop", 1, "--json")
    folder = tmp_path / "all"
    parity = json.loads((folder / "parity.json").read_text())["parity"]
    assert parity == run.json["parity"]
    kinds = {f"{form}{kind}" for form in ("onnx", "classifier") for kind in ("", "-fp16", "-int8")}
    assert set(parity) == {"hf"} | kinds
    for form in ("hf", "onnx", "classifier"):
        assert parity[form]["zeroshot"]["measure"] == "acc1"
        assert parity[form]["zeroshot"]["agreement"] == 1
    assert parity["hf"]["processor"]["max_difference_levels"] < 4
    assert parity["hf"]["processor"]["cropped_one_pixel_aside"] == 8
    assert parity["hf"]["tokenizer"]["same_once_mended"] == 0
    said = " ".join(run.stderr.split())
    assert "The check of quantized files can hardly fail here: acc1 of the model itself is" in said
    assert "a guess would reach 33.3%" in said
    whole, small = folder / "text_encoder.onnx", folder / "text_encoder_int8.onnx"
    assert small.stat().st_size < 0.3 * whole.stat().st_size
    assert (folder / "text_encoder_fp16.onnx").stat().st_size < 0.55 * whole.stat().st_size

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{quick_model}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{quick_model}")
    model.eval()
    images = [Image.open(io.BytesIO(make_image(number, 70))).resize((100, 70)) for number in range(60, 64)]
    images[0].paste((255, 255, 255), (0, 0, 50, 70))
    names = ["green line", "red square", "blue circle"]
    pixels = torch.stack([transform(image) for image in images])
    seen: list[torch.Tensor] = []
    hook = model.visual.ln_post.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        rows = model.encode_image(pixels, normalize=True)
        hook.remove()
        prompts = torch.stack(
            [model.encode_text(tokenizer([f"a {name}", f"a drawing of a {name}."]), normalize=True) for name in names]
        )
        weights = torch.nn.functional.normalize(prompts.mean(1), dim=-1)
        probabilities = (model.logit_scale.exp() * rows @ weights.T).softmax(-1)
        dense = seen[0][:, 1:] @ model.visual.proj

    session = onnxruntime.InferenceSession(folder / "image_encoder.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["image_embeds", "dense_embeds"], {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(found[0], rows.numpy(), atol=1e-5)
    assert found[1].shape == (4, 4, 4, 32)
    np.testing.assert_allclose(found[1].reshape(4, 16, 32), dense.numpy(), atol=1e-4)

    for kind, tolerance in (("", 1e-3), ("_fp16", 1e-2), ("_int8", 0.3)):
        graph = onnx.load(folder / f"classifier{kind}.onnx")
        onnx.checker.check_model(graph, full_check=True)
        session = onnxruntime.InferenceSession(folder / f"classifier{kind}.onnx", providers=["CPUExecutionProvider"])
        batch = np.stack([np.asarray(image) for image in images])
        logits, given = session.run(["logits", "probabilities"], {"image": batch})
        np.testing.assert_allclose(given, probabilities.numpy(), atol=tolerance)
        assert logits.shape == (4, 3)
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["class_names"]) == names
        assert json.loads(metadata["preprocess"])["resize_mode"] == "shortest"

    images[0].save(tmp_path / "photo.png")
    # The example is shown the first image, its white half now transparent black.
    sticker = images[0].convert("RGBA")
    sticker.paste((0, 0, 0, 0), (0, 0, 50, 70))
    sticker.save(folder / "photo.jpg", format="PNG")  # the name in the card; Pillow goes by what is in it
    (printed,) = run_example(folder / "README.md", '"class_names"', uses={"PIL"}, cwd=folder)
    name, probability = printed.rsplit(maxsplit=1)
    best = int(probabilities[0].argmax())
    assert name == names[best]
    assert float(probability) == pytest.approx(float(probabilities[0][best]), abs=1e-3)

    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "cc0-1.0"\nlibrary_name: transformers\n')
    assert "| Teacher | unknown |" in card
    assert "| `classifier_int8.onnx` |" in card


def run_example(page: Path, word: str, *arguments: object, uses: set[str], cwd: Path) -> list[str]:
    """Run the program of a page that has a word, as it stands; it is short, and imports no more than it says."""
    blocks = page.read_text(encoding="utf-8").split("```python\n")[1:]
    (program,) = [block.split("```")[0] for block in blocks if word in block]
    assert len(program.strip().splitlines()) <= 29
    absent = {"torch", "onnx", "open_clip", "clipcid_cli", "transformers", "PIL", "tokenizers"} - uses
    program += f"\nimport sys\nassert not {absent!r} & set(sys.modules)\n"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout.splitlines()


def test_half_precision_is_measured_and_over_tolerance_nothing_is_written(
    clipcid: Clipcid, tiny_model: Path, tmp_path: Path
) -> None:
    call = ("export", tiny_model, "--precision", "fp16", "--json", "--out")
    refused = clipcid(*call, "strict", "--max-difference", "1e-7", check=False)
    assert refused.returncode == 1
    assert "differs from" in refused.json["error"]
    assert "allowed 1e-07" in refused.json["error"]
    assert [name for name in os.listdir(tmp_path / "strict") if not name.startswith(".export")] == []
    result = clipcid(*call, "half").json
    weights = load_file(tmp_path / "half" / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    assert 0 < result["parity"]["open-clip"]["image"]["max_difference"] < 5e-3


@pytest.mark.parametrize("kilobytes", [2000, 6000], ids=["tokenizer", "weights"])  # which library in Rust fails
def test_a_full_disk_is_one_clear_error(tiny_model: Path, tmp_path: Path, kilobytes: int) -> None:
    # The largest file allowed stands for a full disk: libraries that write in Rust report either as their own error.
    call = f"ulimit -f {kilobytes}; {sys.executable} -m clipcid_cli export {tiny_model} --format hf --out full"
    done = subprocess.run(["bash", "-c", call], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Could not write full" in done.stderr
    assert "Free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "full").glob("[!.]*"))


def test_another_form_in_the_same_folder_needs_overwrite(
    clipcid: Clipcid, torchrun: Clipcid, tiny_model: Path, tmp_path: Path
) -> None:
    clipcid("export", tiny_model, "--out", "here")
    refused = clipcid("export", tiny_model, "--out", "here", "--format", "onnx", check=False)
    assert refused.returncode == 1
    assert "settings.format" in refused.stderr
    torchrun(2, "export", tiny_model, "--out", "here", "--format", "onnx", "--overwrite")
    names = {name for name in os.listdir(tmp_path / "here") if not name.startswith(".")}
    assert names == {"README.md", "export.json", "parity.json", *ONNX}


def test_files_of_others_are_not_replaced(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_bytes(b"precious")  # what goes beside them is welcome
    (tmp_path / "out" / "tokenizer.json").write_bytes(b"precious")
    refused = clipcid("export", tiny_model, "--out", "out", "--overwrite", check=False)
    assert refused.returncode == 1
    assert "did not write and would replace: tokenizer.json" in " ".join(refused.stderr.split())
    (tmp_path / "out" / "tokenizer.json").unlink()
    clipcid("export", tiny_model, "--out", "out")
    # Nor are those that another form would replace, once an export lies there.
    (tmp_path / "out" / "config.json").write_bytes(b"precious")
    refused = clipcid("export", tiny_model, "--out", "out", "--format", "hf", "--overwrite", check=False)
    assert "would replace: config.json" in " ".join(refused.stderr.split())
    assert {(tmp_path / "out" / name).read_bytes() for name in ("notes.txt", "config.json")} == {b"precious"}


def test_a_model_is_not_written_over_itself(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    clipcid("export", tiny_model, "--out", "here")
    before = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    (tmp_path / "link").symlink_to("here")
    run = clipcid("export", "link", "--format", "onnx", "--out", "here", "--overwrite", check=False)
    assert run.returncode == 1
    assert "Model link is the folder here" in " ".join(run.stderr.split())
    assert "Give another folder with --out" in " ".join(run.stderr.split())
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == before


def test_missing_onnx_names_the_extra(tiny_model: Path, tmp_path: Path) -> None:
    # The packages are hidden from a real process, as on a machine where the extra was not installed.
    script = (
        "import sys; sys.modules.update(onnx=None, onnxscript=None, onnxruntime=None)\n"
        f"from clipcid_cli.cli import main; main(['export', {str(tiny_model)!r}, '--format', 'onnx'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install '.[export]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "clipcid-work").exists()
