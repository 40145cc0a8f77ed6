"""ExecuTorch programs, written and run where ExecuTorch is installed: in an environment of its own, beside this PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import clean_environment, make_image, write_class_folders
from families import FAMILIES, write_family
from safetensors.torch import save_file

from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model

ROOT = Path(__file__).parents[2]
# It knows neither clipcid nor open_clip.
PROGRAM = """
import sys, numpy, torch
from executorch.runtime import Runtime
name, given, out = sys.argv[1:]
method = Runtime.get().load_program(name).load_method("forward")
rows = [method.execute([row[None].contiguous()])[0].clone() for row in torch.from_numpy(numpy.load(given))]
numpy.save(out, torch.cat(rows).numpy())
assert not {"open_clip", "clipcid_cli"} & set(sys.modules)
"""


def run(*command: object, cwd: Path) -> str:
    words = [*map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the extra `executorch`, and besides what this one has."""
    place = tmp_path_factory.mktemp("executorch")
    run(sys.executable, "-m", "venv", place / "venv", cwd=place)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    ours = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    (packages / "ours.pth").write_text("\n".join(ours))
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["executorch"]
    python = place / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *extra, cwd=place)
    return python


@pytest.mark.slow  # installs ExecuTorch, 190 MB, and compiles six programs: minutes
def test_programs_compute_what_the_model_does(python: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "drawings", {"red square": range(8), "blue circle": range(8, 16)})
    call = ["export", tiny_model, "--format", "executorch", "--quantize", "fp16", "--quantize", "int8", "--out", "out"]
    call += ["--data", "drawings", "--max-accuracy-drop", 1, "--json"]
    exported = json.loads(run(python, "-m", "clipcid_cli", *call, cwd=tmp_path))
    parity = exported["parity"]
    assert list(parity) == ["executorch", "executorch-fp16", "executorch-int8"]
    assert parity["executorch"]["engine"].startswith("ExecuTorch ")
    assert parity["executorch"]["tokenizer"]["same"] == parity["executorch"]["tokenizer"]["texts"]
    assert parity["executorch-int8"]["bytes"] < 0.55 * parity["executorch"]["bytes"]
    assert parity["executorch-fp16"]["bytes"] < 0.55 * parity["executorch"]["bytes"]
    assert json.loads((tmp_path / "out" / "encoders.json").read_text())["context_length"] == 12

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_model}")
    (tmp_path / "photo.png").write_bytes(make_image(5, 64))
    from PIL import Image

    pixels = torch.stack([transform(Image.open(tmp_path / "photo.png")), torch.ones(3, 32, 32)])
    tokens = open_clip.get_tokenizer(f"local-dir:{tiny_model}")(["a red square", "blue"])
    with torch.no_grad():
        rows = model.eval().encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    for tower, given, expected in zip(("image", "text"), (pixels, tokens), rows, strict=True):
        np.save(tmp_path / "given.npy", given.numpy())
        for kind, tolerance in (("", 1e-5), ("_fp16", 2e-3), ("_int8", 3e-2)):
            name = tmp_path / "out" / f"{tower}_encoder{kind}.pte"
            run(python, "-c", PROGRAM, name, "given.npy", "rows.npy", cwd=tmp_path)
            np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), expected, atol=tolerance)
    card = (tmp_path / "out" / "README.md").read_text()
    (program,) = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    run(python, "-c", program, cwd=tmp_path / "out")


@pytest.mark.slow  # installs ExecuTorch, 190 MB, and compiles two programs: minutes
def test_a_model_whose_activation_xnnpack_rounds_passes_the_check(python: Path, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "siglip", FAMILIES["SigLIP 2"])
    save_file(
        dict(load_model(parse_model(str(folder)), fresh_seed=1).module.state_dict()),
        folder / "open_clip_model.safetensors",
    )
    call = ("export", folder, "--format", "executorch", "--out", "out", "--max-difference", 1e-5, "--json")
    parity = json.loads(run(python, "-m", "clipcid_cli", *call, cwd=tmp_path))["parity"]["executorch"]
    assert parity["text"]["max_difference"] < 1e-5
