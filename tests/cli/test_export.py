"""`export` from the command line; what it writes is read by open_clip, transformers and ONNX Runtime by themselves."""

import dataclasses
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import open_clip
import pytest
import torch
from conftest import (
    TINY_CONFIG,
    Clipcid,
    Run,
    make_caption,
    make_image,
    run_clipcid,
    run_command,
    start_clipcid,
    write_class_folders,
    write_tiny_model,
)
from families import FAMILIES, write_family
from PIL import Image
from safetensors.torch import load_file

import clipcid_cli

# What transformers reads, and what transformers.js asks for besides.
HUGGING_FACE = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
HUGGING_FACE += ("special_tokens_map.json", "vocab.json", "merges.txt", "model.safetensors")
HIDDEN = ["onnx", "onnxscript", "onnxruntime", "transformers", "executorch", "torchao"]
NAMES = ("green line", "red square", "blue circle")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export to all forms wrote, and the model's own rows of other images and texts than it compared on."""

    run: Run
    model: Any
    transform: Callable[[Image.Image], torch.Tensor]
    images: list[Image.Image]
    pixels: torch.Tensor
    texts: list[str]
    tokens: torch.Tensor
    image_rows: torch.Tensor
    text_rows: torch.Tensor

    @property
    def folder(self) -> Path:
        return self.run.cwd / "all"


def ask(file: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    """Run a graph; return its outputs in order."""
    return ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, inputs)


def draw(number: int) -> bytes:
    """Draw an image of one of three sizes; of the second Pillow resizes the height first, which bytes at hard edges show."""
    buffer = io.BytesIO()
    size = ((60, 41), (41, 200), (128, 140))[number % 3]
    image = Image.open(io.BytesIO(make_image(number, 64))).resize(size)
    if number % 3 == 1:
        image = image.point(lambda value: 255 * (value > 128))
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model whose activation a folder must carry along, QuickGELU, in all forms; read-only."""
    place = tmp_path_factory.mktemp("exported")
    quick = write_tiny_model(place / "quick", {**TINY_CONFIG, "quick_gelu": True}, seed=3)
    # One folder for each class, no image square, in three sizes of which one is cropped aside by transformers.
    classes = {"red_square": range(0, 24, 3), "blue_circle": range(1, 24, 3), "green_line": range(2, 24, 3)}
    write_class_folders(place / "drawings", classes, draw)
    (place / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (place / "templates.txt").write_text("a {c}\na drawing of a {}.\n")
    call = ["export", quick, "--format", "open-clip", "--format", "hf", "--format", "onnx", "--out", "all"]
    call += ["--data", "drawings", "--classnames", "names.txt", "--templates", "templates.txt", "--dense"]
    call += ["--license", "cc0-1.0", "--quantize", "fp16", "--quantize", "int8", "--max-accuracy-drop", 1, "--json"]
    run = run_clipcid(*call, cwd=place)
    for again in (run_clipcid(*call, *dry, cwd=place) for dry in ((), ("--dry-run",))):
        assert "already holds this export" in again.stderr
        assert again.json["parity"] == run.json["parity"]

    images = [Image.open(io.BytesIO(make_image(number, 70))).resize((100, 70)) for number in range(60, 64)]
    images[0].paste((255, 255, 255), (0, 0, 50, 70))
    texts = [make_caption(number) for number in range(50, 57)]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{quick}")
    pixels = torch.stack([transform(image) for image in images])
    tokens = open_clip.get_tokenizer(f"local-dir:{quick}")(texts)
    with torch.no_grad():
        rows = model.eval().encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    return Exported(run, model, transform, images, pixels, texts, tokens, *rows)


def test_encoders_compute_what_the_model_does(exported: Exported) -> None:
    folder = exported.folder
    image_rows, dense = ask(folder / "image_encoder.onnx", pixel_values=exported.pixels.numpy())
    np.testing.assert_allclose(image_rows, exported.image_rows, atol=1e-5)
    (text_rows,) = ask(folder / "text_encoder.onnx", input_ids=exported.tokens.numpy())
    np.testing.assert_allclose(text_rows, exported.text_rows, atol=1e-5)
    seen: list[torch.Tensor] = []
    visual = exported.model.visual
    hook = visual.ln_post.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        visual(exported.pixels)
        expected = seen[0][:, 1:] @ visual.proj
    hook.remove()
    assert dense.shape == (4, 4, 4, 32)
    np.testing.assert_allclose(dense.reshape(4, 16, 32), expected, atol=1e-4)
    written, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        assert torch.equal(written.eval().encode_image(exported.pixels, normalize=True), exported.image_rows)
    whole, small = folder / "text_encoder.onnx", folder / "text_encoder_int8.onnx"
    assert small.stat().st_size < 0.3 * whole.stat().st_size
    assert (folder / "text_encoder_fp16.onnx").stat().st_size < 0.55 * whole.stat().st_size

    graph = onnx.load(folder / "image_encoder.onnx")
    onnx.checker.check_model(graph)
    assert {opset.domain: opset.version for opset in graph.opset_import} == {"": 20}
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["preprocess"])["size"] == [32, 32]
    package = str(Path(clipcid_cli.__file__).parent).encode()
    assert package not in (folder / "image_encoder.onnx").read_bytes(), "the file must not name paths of its machine"


def test_encoders_of_8_bits_compute_nearly_what_the_model_does(exported: Exported) -> None:
    image_rows, _ = ask(exported.folder / "image_encoder_int8.onnx", pixel_values=exported.pixels.numpy())
    (text_rows,) = ask(exported.folder / "text_encoder_int8.onnx", input_ids=exported.tokens.numpy())
    for found, rows in ((image_rows, exported.image_rows), (text_rows, exported.text_rows)):
        assert (found * rows.numpy()).sum(axis=1).min() > 0.99


def test_rows_are_compared_of_all_images_and_in_8_bits_one_by_one(exported: Exported) -> None:
    drawn = [*range(1, 24, 3), *range(2, 24, 3), *range(0, 24, 3)]  # folder after folder
    pixels = torch.stack([exported.transform(Image.open(io.BytesIO(draw(number)))) for number in drawn])
    with torch.no_grad():
        expected = exported.model.encode_image(pixels, normalize=True).numpy()
    parity = exported.run.json["parity"]
    for form, name in (("onnx", "image_encoder.onnx"), ("onnx-int8", "image_encoder_int8.onnx")):
        session = ort.InferenceSession(exported.folder / name, providers=["CPUExecutionProvider"])
        cosines = []
        for size, count in ((1, 24), (2, 16), (5, 16), (16, 16), (32, 24)):
            for first in range(0, count, size):
                batch = slice(first, min(first + size, count))
                rows = session.run(["image_embeds"], {"pixel_values": pixels[batch].numpy()})[0]
                cosines += [*(rows * expected[batch]).sum(axis=1)]
        assert parity[form]["image"]["samples"] == 24
        assert parity[form]["image"]["min_cosine"] == pytest.approx(min(cosines), abs=2e-6)


def test_rows_of_16_bits_are_of_unit_length(exported: Exported) -> None:
    image_rows, _ = ask(exported.folder / "image_encoder_fp16.onnx", pixel_values=exported.pixels.numpy())
    (text_rows,) = ask(exported.folder / "text_encoder_fp16.onnx", input_ids=exported.tokens.numpy())
    for rows in (image_rows, text_rows):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_whoever_reads_one_file_reads_all(exported: Exported) -> None:
    modes = {path.name: path.stat().st_mode for path in exported.folder.iterdir() if path.is_file()}
    assert len(modes) > 15
    assert len(set(modes.values())) == 1, modes


def test_transformers_computes_what_the_model_does(exported: Exported) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(exported.folder).eval()
        processor = CLIPProcessor.from_pretrained(exported.folder)
        given = processor(text=exported.texts, images=exported.images, return_tensors="pt", padding="max_length")
        with torch.no_grad():
            found = model(**given)
    np.testing.assert_allclose(found.image_embeds, exported.image_rows, atol=1e-3)  # of pixels made by another library
    np.testing.assert_allclose(found.text_embeds, exported.text_rows, atol=1e-5)


@pytest.mark.parametrize(("kind", "tolerance"), [("", 1e-4), ("_fp16", 1e-2), ("_int8", 0.3)])
def test_a_classifier_gives_the_probabilities_of_the_model(exported: Exported, kind: str, tolerance: float) -> None:
    file = exported.folder / f"classifier{kind}.onnx"
    onnx.checker.check_model(onnx.load(file), full_check=True)
    logits, given = ask(file, image=np.stack([np.asarray(image) for image in exported.images]))
    np.testing.assert_allclose(given, find_probabilities(exported), atol=tolerance)
    assert logits.shape == (4, 3)
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(metadata["class_names"]) == list(NAMES)
    assert json.loads(metadata["preprocess"])["resize_mode"] == "shortest"


def find_probabilities(exported: Exported) -> torch.Tensor:
    """Return how likely each class is for each image, by open_clip and the formula."""
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported.run.cwd / 'quick'}")
    prompts = tokenizer([prompt for name in NAMES for prompt in (f"a {name}", f"a drawing of a {name}.")])
    with torch.no_grad():
        rows = exported.model.encode_text(prompts, normalize=True).view(len(NAMES), 2, -1).mean(1)
        weights = torch.nn.functional.normalize(rows, dim=-1)
        return (exported.model.logit_scale.exp() * exported.image_rows @ weights.T).softmax(-1)


def test_parity_is_measured_and_told(exported: Exported) -> None:
    folder, result = exported.folder, exported.run.json
    assert all((exported.run.cwd / path).is_file() for path in result["files"].values())
    names = {name for name in os.listdir(folder) if not name.endswith(".onnx")}
    own = {"README.md", "export.json", "parity.json", "open_clip_config.json", "open_clip_model.safetensors", "onnx"}
    assert names == own | {*HUGGING_FACE}, "nothing of the run is left in what is exported"
    for ours, theirs in (("image_encoder", "vision_model"), ("text_encoder", "text_model")):
        assert (folder / f"{ours}.onnx").samefile(folder / "onnx" / f"{theirs}.onnx"), "of no space of its own"
    assert json.loads((folder / "config.json").read_text())["text_config"]["hidden_act"] == "quick_gelu"
    record = json.loads((folder / "parity.json").read_text())
    assert record["reference"]["inputs"].endswith("/drawings")
    parity = record["parity"]
    assert parity == result["parity"]
    kinds = {f"{form}{kind}" for form in ("onnx", "classifier") for kind in ("", "-fp16", "-int8")}
    assert set(parity) == {"open-clip", "hf"} | kinds
    for form in ("open-clip", "onnx"):
        for tower in ("image", "text"):
            assert parity[form][tower]["batch_sizes"] == [1, 2, 5, 16] + [32] * (tower == "image")
            assert parity[form][tower]["min_cosine"] > 0.99999
    for form in ("hf", "onnx", "classifier"):
        assert (parity[form]["zeroshot"]["measure"], parity[form]["zeroshot"]["agreement"]) == ("acc1", 1)
    for found in (record["reference"], *parity.values()):
        assert 0 < found["latency_ms"]["p50"] <= found["latency_ms"]["p95"]
    assert parity["onnx"]["tokenizer"]["same"] == parity["onnx"]["tokenizer"]["texts"]
    assert parity["hf"]["tokenizer"]["same_once_mended"] == 0
    processor = parity["hf"]["processor"]
    assert processor["max_difference_levels"] < 4
    assert processor["cropped_one_pixel_aside"] == 8
    assert processor["resized_width_first"] == 8
    assert processor["max_difference_levels_width_first"] > 4
    assert 0.99 < processor["min_cosine_width_first"] < 1
    assert parity["classifier"]["max_cosine_difference"] < 1e-3
    assert "The check of quantized files can hardly fail here: acc1 of the model itself is" in exported.run.said
    assert "a guess would reach 33.3%" in exported.run.said
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "cc0-1.0"\nlibrary_name: open_clip\n')
    assert "| Teacher | unknown |" in card
    assert "| Embedding width | 32 |" in card
    assert "| `classifier_int8.onnx` |" in card
    assert "tells 3 classes apart, by 2 prompts each (a {c}, …):\n\ngreen line, red square, blue circle\n\n#" in card
    assert "Of the 24 images compared, 8 were so resized: pixels differ by up to" in card
    assert "Images become 32 × 32 pixels, and texts are cut at 12 tokens" in card
    assert "`tokenizer(texts, { padding: 'max_length', truncation: true })`" in card


def test_the_examples_of_the_documents_run_as_they_stand(exported: Exported, tmp_path: Path) -> None:
    photo = exported.images[1].resize((90, 131))  # the longer side is rounded to that of the model
    photo.save(tmp_path / "photo.png")
    page = Path(clipcid_cli.__file__).parent / "docs" / "export.md"
    given = (exported.folder, tmp_path / "photo.png", *exported.texts)
    printed = run_example(page, "Tokenizer.from_file", *given, uses={"PIL", "tokenizers"}, cwd=tmp_path)
    with torch.no_grad():
        row = exported.model.encode_image(exported.transform(photo)[None], normalize=True)[0]
    np.testing.assert_allclose(json.loads(printed[0]), exported.text_rows @ row, atol=1e-4)

    # The example of the card is shown the first image, its white half now transparent black.
    sticker = exported.images[0].convert("RGBA")
    sticker.paste((0, 0, 0, 0), (0, 0, 50, 70))
    folder = shutil.copytree(exported.folder, tmp_path / "out")
    sticker.save(folder / "photo.jpg", format="PNG")  # the name in the card; Pillow goes by what is in it
    (printed,) = run_example(folder / "README.md", '"class_names"', uses={"PIL"}, cwd=folder)
    run_example(folder / "README.md", "Tokenizer.from_file", uses={"tokenizers"}, cwd=folder)
    name, probability = printed.rsplit(maxsplit=1)
    expected = find_probabilities(exported)[0]
    assert name == NAMES[int(expected.argmax())]
    assert float(probability) == pytest.approx(float(expected.max()), abs=1e-3)


def run_example(page: Path, word: str, *arguments: object, uses: set[str], cwd: Path) -> list[str]:
    """Run the program of a page that has a word, as it stands; it is short, and imports no more than it says."""
    blocks = page.read_text(encoding="utf-8").split("```python\n")[1:]
    (program,) = [block.split("```")[0] for block in blocks if word in block]
    assert len(program.strip().splitlines()) <= 29
    absent = {"torch", "onnx", "open_clip", "clipcid_cli", "transformers", "PIL", "tokenizers"} - uses
    program += f"\nimport sys\nassert not {absent!r} & set(sys.modules)\n"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout.splitlines()


def test_half_precision_is_measured_and_limited(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    call = ("export", tiny_model, "--precision", "fp16", "--json", "--out")
    refused = clipcid(*call, "strict", "--max-difference", "1e-7", code=1)
    assert "differs from" in refused.json["error"]
    assert "allowed 1e-07" in refused.json["error"]
    assert not (tmp_path / "strict").exists(), "what it made is removed"
    result = clipcid(*call, "half").json
    weights = load_file(tmp_path / "half" / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    assert 0 < result["parity"]["open-clip"]["image"]["max_difference"] < 5e-3


@pytest.mark.parametrize("kilobytes", [2000, 6000], ids=["tokenizer", "weights"])  # which library in Rust fails
def test_a_full_disk_is_one_clear_error(tiny_model: Path, tmp_path: Path, kilobytes: int) -> None:
    # The largest file allowed stands for a full disk: libraries that write in Rust report either as their own error.
    process = start_clipcid("export", tiny_model, "--format", "hf", "--out", "full", cwd=tmp_path)
    resource.prlimit(process.pids[0], resource.RLIMIT_FSIZE, (1024 * kilobytes, 1024 * kilobytes))
    assert process.wait() == 1
    _, errors = process.read()
    assert "Could not write full" in errors
    assert "Free some space" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "full").glob("[!.]*"))


def test_another_form_needs_overwrite(clipcid: Clipcid, torchrun: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    clipcid("export", tiny_model, "--out", "here")
    assert "settings.format" in clipcid("export", tiny_model, "--out", "here", "--format", "hf", code=1).stderr
    changed = shutil.copytree(tiny_model, tmp_path / "changed" / tiny_model.name)
    config = changed / "open_clip_config.json"
    for part, entry, name in (("model_cfg", "quick_gelu", "config"), ("preprocess_cfg", "mean", "preprocess")):
        content = json.loads((tiny_model / config.name).read_text())
        content[part][entry] = {"quick_gelu": True, "mean": [0.4] * 3}[entry]
        config.write_text(json.dumps(content))
        assert f"settings.{name}: " in clipcid("export", changed, "--out", "here", code=1).stderr
    torchrun(2, "export", tiny_model, "--out", "here", "--format", "hf", "--overwrite")
    names = {name for name in os.listdir(tmp_path / "here") if not name.startswith(".")}
    assert names == {"README.md", "export.json", "parity.json", *HUGGING_FACE}
    assert "library_name: transformers" in (tmp_path / "here" / "README.md").read_text()


def test_transformers_js_finds_its_files_in_onnx_alone(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    clipcid("export", tiny_model, "--out", "js", "--format", "onnx")
    expected = {*HUGGING_FACE} - {"model.safetensors"} | {"onnx", "text_encoder.onnx"}
    assert expected <= {*os.listdir(tmp_path / "js")}


def test_files_of_others_are_not_replaced(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_bytes(b"precious")  # what goes beside them is welcome
    (tmp_path / "out" / "tokenizer.json").write_bytes(b"precious")
    refused = clipcid("export", tiny_model, "--out", "out", "--overwrite", code=1)
    assert "did not write and would replace: tokenizer.json" in refused.said
    (tmp_path / "out" / "tokenizer.json").unlink()
    clipcid("export", tiny_model, "--out", "out")
    # Nor are those that another form would replace, once an export lies there.
    (tmp_path / "out" / "config.json").write_bytes(b"precious")
    refused = clipcid("export", tiny_model, "--out", "out", "--format", "hf", "--overwrite", check=False)
    assert "would replace: config.json" in refused.said
    assert {(tmp_path / "out" / name).read_bytes() for name in ("notes.txt", "config.json")} == {b"precious"}


def test_a_model_is_not_written_over_itself(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    clipcid("export", tiny_model, "--out", "here")
    before = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    (tmp_path / "link").symlink_to("here")
    run = clipcid("export", "link", "--format", "onnx", "--out", "here", "--overwrite", code=1)
    assert "Model link is the folder here" in run.said
    assert "Give another folder with --out" in run.said
    assert {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()} == before


def test_missing_packages_name_the_extra(tiny_model: Path, tiny_shards: Path, tmp_path: Path) -> None:
    student = write_family(tmp_path / "fresh", FAMILIES["MetaCLIP 2"])  # text tower and tokenizer are of transformers
    commands = (
        ["export", tiny_model, "--format", "onnx"],
        ["export", tiny_model, "--format", "executorch"],
        ["distill", tiny_shards, "--student", student, "--teacher", "none", "--preset", "clip", "--steps", 1],
    )
    # The packages are hidden from a real process, as on a machine where the extra was not installed.
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({HIDDEN!r}))\n"
        "from clipcid_cli.cli import run\n"
        f"assert [run(command) for command in {[list(map(str, command)) for command in commands]!r}] == [1, 1, 1]"
    )
    run = run_command([sys.executable, "-c", script], tmp_path, True, 300, None)
    assert run.stderr.count("pip install '.[export]'") == 2
    assert "--format executorch needs executorch, torchao, transformers, which are not installed." in run.stderr
    assert "pip install '.[executorch]'" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "clipcid-work" / "export").exists()
