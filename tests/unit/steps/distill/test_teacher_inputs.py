"""Embeddings that match the teacher and the data, and hold what a run asks for; else refused with the fix."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from balance_data import write_embeddings
from safetensors.numpy import load_file, save_file
from teaching_data import embed_data, join, train, write_student

from clipcid_cli.algorithms.losses.shared_space import SharedSpace
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.inputs import open_stored
from clipcid_cli.steps.distill.teacher import choose_space
from clipcid_cli.steps.settings.distill import DistillSettings

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folders(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embeddings with a view of each image, of images alone, and of another tool."""
    root = tmp_path_factory.mktemp("embedded")
    embed_data(tiny_shards, tiny_model, root / "tiny", views=1)
    embed_data(tiny_shards, tiny_model, root / "images", text=False, fast_decode=True)
    rows = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float16)
    write_embeddings(root / "foreign", rows)
    return {name: root / name for name in ("tiny", "images", "foreign")}


def change_mean(config: dict[str, Any]) -> None:
    config["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.5]


def change_context(config: dict[str, Any]) -> None:
    config["model_cfg"]["text_cfg"]["context_length"] = 10


def change_heads(config: dict[str, Any]) -> None:
    config["model_cfg"]["text_cfg"]["heads"] = 4


def open_for(model: Path, folder: Path) -> None:
    settings = DistillSettings(student="student.json", teacher=(str(model),), embeddings=(folder,))
    open_stored(settings, (folder,), None)


@pytest.mark.parametrize(
    ("change", "both"),
    [
        (change_mean, r"preprocessing mean \[0\.5, .*; the teacher .*preprocessing mean \[0\.4, 0\.5, 0\.5\]"),
        (change_context, "tokenizer context_length 12; the teacher .*tokenizer context_length 10"),
        (change_heads, 'architecture text_cfg .*"heads": 2.*; the teacher .*architecture text_cfg .*"heads": 4'),
        (None, "weights blake2b:[0-9a-f]{32}; the teacher .*weights blake2b:[0-9a-f]{32}"),
    ],
)
def test_another_teachers_embeddings_are_refused(
    change: Change | None, both: str, folders: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    open_for(tiny_model, folders["tiny"])
    other = tmp_path / "tiny"
    shutil.copytree(tiny_model, other)
    if change is None:
        weights = load_file(other / "open_clip_model.safetensors")
        weights["logit_scale"] = np.asarray(weights["logit_scale"] + np.float32(1e-3))
        save_file(weights, other / "open_clip_model.safetensors")
    else:
        config = json.loads((other / "open_clip_config.json").read_text())
        change(config)
        (other / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ClipcidError, match=both) as raised:
        open_for(other, folders["tiny"])
    assert re.search(rf"clipcid embed \S+ --model {other}", raised.value.fix)


@pytest.mark.parametrize(
    ("kind", "asked", "message", "flags"),
    [
        ("tiny", {"extra_texts": 4}, "but there are no texts", " --views 1 --text-variants 4"),
        ("images", {"views": "stored"}, "--views stored, but .* no views", " --no-text --views 4 --view-kind mix"),
        ("images", {"extra_texts": 4}, "but there are no texts", " --fast-decode --text-variants 4"),
    ],
)
def test_what_is_asked_for_and_lacking_is_refused_with_the_command_that_makes_it(
    kind: str,
    asked: dict[str, Any],
    message: str,
    flags: str,
    folders: dict[str, Path],
    tiny_shards: Path,
    tiny_model: Path,
) -> None:
    with pytest.raises(ClipcidError, match=message) as raised:
        join(tiny_shards, folders[kind], preset="clip", loss=("clip=0", "fd=1"), **asked)
    command = "clipcid embed" + raised.value.fix.split("clipcid embed")[-1]
    expected = f"clipcid embed {tiny_shards} --model {tiny_model} --out {folders[kind]} --overwrite{flags}"
    made = json.loads((folders[kind] / "embed.json").read_text())["settings"]
    expected += f" --precision {made['precision']} --batch-size {made['batch_size']}"
    assert sorted(command.split(" --")) == sorted(expected.split(" --"))


def test_keys_of_another_form_are_refused(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny", keys="shard")
    said = "were made with --keys shard, the data is read with --keys sample"
    with pytest.raises(ClipcidError, match=said) as raised:
        join(tiny_shards, tmp_path / "tiny")
    assert raised.value.fix == "Add --keys shard."


def test_a_teacher_of_images_alone_gives_its_images(
    tiny_shards: Path, tiny_model: Path, folders: dict[str, Path]
) -> None:
    run = join(tiny_shards, folders["images"], preset="clip", loss=("fd=1",), teacher_space="pca")
    assert not run.inputs.first_captions, "any caption may be shown where the teacher knows none"
    rows, batch = run.show(load_model(parse_model(str(tiny_model))))
    for width in (32, 24):
        image, text, _ = run.teach(batch, width)
        assert text is None
        assert image.shape == (24, width)
    stored = run.embeddings.rows(Kind.IMAGES).take(np.array(rows)).astype(np.float32)
    found = image.numpy()
    assert np.corrcoef((found @ found.T).ravel(), (stored @ stored.T).ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("online", "message"),
    [(False, "captions are needed by: crd"), (True, "does not record which model made it")],
)
def test_embeddings_of_another_tool_that_say_too_little_are_refused(
    online: bool, message: str, tiny_shards: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    common = {"student": str(write_student(tmp_path)), "preset": "clip-kd", "online_teacher": online}
    with pytest.raises(ClipcidError, match=message) as raised:
        train(tmp_path / "work", tiny_shards, embeddings=(folders["foreign"],), **common)
    if not online:
        assert raised.value.fix.endswith(f"Or embed the captions too: clipcid embed {tiny_shards} --model MODEL")


def choose(work: Path, folder: Path, space: str = "pca", **settings: Any) -> SharedSpace:
    given = DistillSettings(student="student.json", teacher_space=space, work=work, **settings)
    with open_dist_context("cpu") as context:
        return choose_space(given, 32, open_embeddings(folder), 24, context)


def test_losses_that_compare_no_features_of_student_and_teacher_need_no_shared_space(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for preset in ("dr", "clip-kd"):
        space = choose(tmp_path, folders["foreign"], "auto", preset=preset)
        assert (space.width == 32 and space.axes is None and not space.is_learned) == (preset == "dr")
    assert choose(tmp_path, folders["foreign"], "pca", preset="dr").axes is not None
