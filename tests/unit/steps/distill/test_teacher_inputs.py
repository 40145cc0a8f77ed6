"""Embeddings that do not match the teacher or the data: refused, naming both values and the fix."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from balance_data import write_embeddings
from conftest import write_tiny_model
from safetensors.numpy import load_file, save_file
from teaching_data import Listener, embed_data, join, train, write_student

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.formats.results.clusters import TopClusters
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.clusters import use_clusters
from clipcid_cli.steps.distill.inputs import open_stored
from clipcid_cli.steps.distill.samples import MatchCounts
from clipcid_cli.steps.settings.distill import DistillSettings

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def embedded(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "tiny"
    embed_data(tiny_shards, tiny_model, folder)
    return folder


def change_mean(config: dict[str, Any]) -> None:
    config["preprocess_cfg"]["mean"] = [0.4, 0.5, 0.5]


def change_context(config: dict[str, Any]) -> None:
    config["model_cfg"]["text_cfg"]["context_length"] = 10


def change_heads(config: dict[str, Any]) -> None:
    config["model_cfg"]["text_cfg"]["heads"] = 4


def open_for(model: Path, folder: Path) -> None:
    settings = DistillSettings(student="student.json", teacher=str(model), embeddings=folder)
    open_stored(settings, folder, None, Listener())


@pytest.mark.parametrize(
    ("change", "both"),
    [
        (
            change_mean,
            r"preprocessing mean \[0\.5, 0\.5, 0\.5\]; the teacher .*preprocessing mean \[0\.4, 0\.5, 0\.5\]",
        ),
        (change_context, "tokenizer context_length 12; the teacher .*tokenizer context_length 10"),
        (change_heads, 'architecture text_cfg .*"heads": 2.*; the teacher .*architecture text_cfg .*"heads": 4'),
        (None, "weights blake2b:[0-9a-f]{32}; the teacher .*weights blake2b:[0-9a-f]{32}"),
    ],
)
def test_another_teachers_embeddings_are_refused(
    change: Change | None, both: str, embedded: Path, tiny_model: Path, tmp_path: Path
) -> None:
    open_for(tiny_model, embedded)
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
        open_for(other, embedded)
    assert re.search(rf"clipcid embed \S+ --model {other}", raised.value.fix)


def test_keys_of_another_form_are_refused(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny", keys="shard")
    with pytest.raises(
        ClipcidError, match="were made with --keys shard, the data is read with --keys sample"
    ) as raised:
        join(tiny_shards, tmp_path / "tiny")
    assert raised.value.fix == "Add --keys shard."


def test_a_teacher_of_images_alone_gives_its_images(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    embed_data(tiny_shards, tiny_model, tmp_path / "tiny", text=False)
    run = join(tiny_shards, tmp_path / "tiny", preset="clip", loss=("fd=1",), teacher_space="pca")
    assert not run.inputs.first_captions, "any caption may be shown where the teacher knows none"
    rows, batch = run.show(load_model(parse_model(str(tiny_model))))
    for width in (32, 24):
        image, text, _ = run.teach(batch, width)
        assert text is None
        assert image.shape == (24, width)
    stored = run.embeddings.rows(Kind.IMAGES).take(np.array(rows)).astype(np.float32)
    found = image.numpy()
    assert np.corrcoef((found @ found.T).ravel(), (stored @ stored.T).ravel())[0, 1] > 0.95


def test_a_loss_that_needs_captions_says_how_to_embed_them(tiny_shards: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float16)
    folder = write_embeddings(tmp_path / "foreign", rows)
    student = str(write_student(tmp_path))
    with pytest.raises(ClipcidError, match="captions are needed by: crd") as raised:
        train(tmp_path / "work", tiny_shards, student=student, embeddings=folder, preset="clip-kd")
    assert raised.value.fix.endswith(f"Or embed the captions too: clipcid embed {tiny_shards} --model MODEL")


def test_an_online_teacher_needs_a_name_beside_anothers_embeddings(tiny_shards: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float16)
    folder = write_embeddings(tmp_path / "foreign", rows)
    with pytest.raises(ClipcidError, match="does not record which model made it"):
        train(
            tmp_path / "work",
            tiny_shards,
            student=str(write_student(tmp_path)),
            embeddings=folder,
            preset="clip-kd",
            online_teacher=True,
        )


def test_embeddings_of_a_namesake_are_no_axes_for_an_online_teacher(
    tiny_shards: Path, tiny_model: Path, embedded: Path, tmp_path: Path
) -> None:
    shutil.copytree(embedded, tmp_path / "work" / "embeddings" / "tiny")
    namesake = write_tiny_model(tmp_path / "tiny", seed=4)
    settings = {"student": str(write_student(tmp_path)), "preset": "clip-kd", "online_teacher": True, "steps": 1}
    _, said = train(tmp_path / "work", tiny_shards, teacher=str(namesake), **settings)
    assert "no stored embeddings" in said
    _, said = train(
        tmp_path / "work", tiny_shards, teacher=str(tiny_model), name="own", teacher_space="pca", **settings
    )
    assert "24 of the teacher's 32 dimensions, which keep" in said


def test_an_online_teacher_without_a_name_is_the_embeddings_or_an_error_where_there_are_two(
    tiny_shards: Path, embedded: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(embedded, work / "embeddings" / "one")
    settings = {"student": str(write_student(tmp_path)), "preset": "clip-kd", "online_teacher": True, "steps": 1}
    _, said = train(work, tiny_shards, teacher_space="project", **settings)
    assert "the teacher's 32 dimensions, by a learned layer" in said
    shutil.copytree(embedded, work / "embeddings" / "two")
    with pytest.raises(ClipcidError, match="has those of 2 models: one, two") as refused:
        train(work, tiny_shards, name="second", **settings)
    assert refused.value.fix == "Choose one with --embeddings."


@pytest.mark.parametrize(
    ("asked", "known", "freeze_text", "several", "taught"),
    [
        ("auto", True, False, False, True),
        ("auto", False, False, False, False),
        ("auto", True, True, False, False),
        ("auto", True, False, True, False),  # their clusters are those of the first caption
        ("both", True, False, True, True),
        ("image", True, False, False, False),
    ],
)
def test_which_towers_clusters_teach(asked: str, known: bool, freeze_text: bool, several: bool, taught: bool) -> None:
    nearest = TopClusters(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float16))
    made = SimpleNamespace(repair=None, temperatures={"image": 0.1})
    clusters: Any = SimpleNamespace(folder="c", centroids=[], captions=nearest if known else None, sidecar=made)
    settings = DistillSettings(student="s.json", preset="cid", cluster_towers=asked, freeze_text=freeze_text)
    assert use_clusters(settings, clusters, None, MatchCounts(), several, Listener()).teach_text == taught
