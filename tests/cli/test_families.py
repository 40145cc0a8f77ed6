"""Each family of open_clip's models through every command: it works, or is refused, as docs/data.md says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Clipcid, embed_with_open_clip, make_caption, make_image, run_clipcid, write_classified
from distill_data import STUDENT
from families import FAMILIES, carry_trunk, write_family
from safetensors.torch import save_file

import clipcid_cli
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.inherit import inherit
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model


def read_documented() -> dict[str, dict[str, str]]:
    """Read the table of the documentation, where families that are alike share a row: by family what each column says."""
    text = (Path(clipcid_cli.__file__).parent / "docs" / "data.md").read_text()
    lines = text.partition("### Families")[2].splitlines()
    columns, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return {name: dict(zip(columns[1:], cells, strict=True)) for names, *cells in rows for name in names.split(", ")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_shards: Path) -> Path:
    """A folder with a ViT teacher's embeddings, a ViT student, and images of three classes."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "student.json").write_text(json.dumps(STUDENT))
    write_classified(folder / "classes")
    run_clipcid("embed", tiny_shards, "--model", tiny_model, cwd=folder)
    return folder


def write_trained(fresh: Path, folder: Path) -> Path:
    """Copy a family's folder, and add random weights."""
    shutil.copytree(fresh, folder)
    carry_trunk(fresh, folder)
    module = load_model(parse_model(str(fresh)), fresh_seed=1).module
    save_file(dict(module.state_dict()), folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_smaller_student_inherits_the_towers_that_are_documented(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    source = load_model(parse_model(str(write_family(tmp_path / "source", family))), fresh_seed=1).module
    trunk = family.trunk and family.trunk | ({"embed_dim": 24} if "SigLIP" in name else {})
    narrow = dataclasses.replace(family, smaller=family.smaller | {"embed_dim": 24}, trunk=trunk)
    student = load_model(parse_model(str(write_family(tmp_path / "student", narrow))), fresh_seed=0).module
    towers = set[str]()
    for tower in ("image", "text"):
        with contextlib.suppress(ClipcidError):
            inherit(student, source, tower)
            towers.add(tower)
    said = read_documented()[name]["`--init-from` a larger one"]
    assert towers == ({"image", "text"} if said == "yes" else {said.removesuffix(" tower")})


def test_the_documentation_names_each_family() -> None:
    assert sorted(read_documented()) == sorted(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_works_or_is_refused_as_documented(
    name: str, base: Path, tiny_model: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    fresh = write_family(tmp_path / "fresh", FAMILIES[name])
    trained = write_trained(fresh, tmp_path / "trained")
    work = ("--work", shutil.copytree(base / "clipcid-work", tmp_path / "learns"))
    learns = ("distill", *work, "--teacher", tiny_model, "--student", fresh, "--steps", 20, "--batch-size", 8)
    student = tmp_path / "learns" / "distill" / "student" / "student"
    exports = ("export", student, "--data", tiny_shards, "--format")
    commands = {
        "embed": ("embed", tiny_shards, "--model", trained, "--precision", "fp32"),
        "teach": ("distill", "--teacher", trained, "--student", base / "student.json", *learns[-4:]),
        "learn": (*learns, "--name", "student"),
        "--init-from": (*learns, "--name", "begun", "--init-from", trained),
        "evaluate": ("eval-zeroshot", trained, base / "classes"),
        **{f"`--format {form}`": (*exports, form, "--out", form) for form in ("open-clip", "onnx", "hf")},
    }
    said = dict[str, str]()
    documented = read_documented()[name]
    for column, words in commands.items():
        outcome = run_clipcid(*words, cwd=tmp_path, check=False, timeout=600)  # PyTorch's exporter takes its time
        assert not outcome.problems(), outcome
        works = documented.get(column, "works") == "works"
        if column == "`--format open-clip`" and FAMILIES[name].trunk is not None:
            works = False  # such a tower is a folder of this machine, which a folder that may be moved does not name
        assert (outcome.returncode == 0) == works, outcome
        said[column] = outcome.said
        if column == "learn" and outcome.returncode == 0:
            carry_trunk(fresh, student)
    assert f"Both towers start from {trained}." in said["--init-from"]
    assert ("at their full length" in said["learn"]) == (documented["texts without padding"] == "no")
    assert "at their full length" not in said["teach"]
    if FAMILIES[name].text is None:  # open_clip reads such a text tower from a hub
        embeddings = tmp_path / "clipcid-work" / "embeddings" / "trained"
        rows = (np.load(embeddings / part / f"{part}_0000.npy") for part in ("img_emb", "text_emb"))
        expected = embed_with_open_clip(trained, [make_image(0)], [make_caption(0)])
        for ours, theirs in zip(rows, expected, strict=True):
            np.testing.assert_allclose(ours[0], theirs[0].numpy(), atol=1e-3)


def test_a_tokenizer_from_the_hub_is_written_along(
    binary: Clipcid, clipcid: Clipcid, tiny_shards: Path, base: Path, tmp_path: Path
) -> None:
    fresh = write_family(tmp_path / "fresh", FAMILIES["SigLIP 2"])
    # Its tokenizer is where a download would be, not beside the configuration.
    repository = tmp_path / "hub" / "hub" / "models--timm--ViT-B-16-SigLIP2-256"
    for part in ("snapshots", ".no_exist"):
        (repository / part / "one").mkdir(parents=True)
    (repository / ".no_exist" / "one" / "config.json").touch()  # as the hub's library notes that there is none
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("one")
    for file in fresh.glob("tokenizer*"):
        file.rename(repository / "snapshots" / "one" / file.name)
    call = ("distill", tiny_shards, "--student", fresh, "--teacher", "none", "--preset", "clip", "--batch-size", 8)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "nothing")}
    refused = binary(*call, "--steps", 2, check=False, env=offline)
    assert "The files of timm/ViT-B-16-SigLIP2-256, the tokenizer of model" in refused.said
    binary(*call, "--steps", 2, "--name", "a", env=offline | {"HF_HOME": str(tmp_path / "hub")})
    student = tmp_path / "clipcid-work" / "distill" / "a" / "student"
    carry_trunk(fresh, student)
    clipcid("eval-zeroshot", student, base / "classes")
