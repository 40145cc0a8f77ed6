"""An image tower trained beside its teacher's text tower, with captions and without: what runs, moves, and is served."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shard_members, write_tar
from distill_data import STUDENT, train
from safetensors.torch import load_file
from teaching_data import FP32, embed_data, join

from clipcid_cli.algorithms.metrics.retrieval import retrieval_ranks
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.embeddings.folder import open_embeddings
from clipcid_cli.formats.embeddings.kinds import Kind
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.runtime.models.pruned_forward import PrunedForward
from clipcid_cli.steps.distill.held_out_images import HeldOutImages
from clipcid_cli.steps.distill.kept_text import find_teacher
from clipcid_cli.steps.distill.memory import fitting_batch
from clipcid_cli.steps.distill.stored import find_embeddings
from clipcid_cli.steps.distill.student import load_student
from clipcid_cli.steps.distill.teachers import name_no_teacher
from clipcid_cli.steps.settings.distill import DistillSettings

CPU = torch.device("cpu")
WEIGHTS = "open_clip_model.safetensors"
KEPT: dict[str, Any] = {"text_tower": "teacher", "preset": None, "val_fraction": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder of 16 images without captions and one of 16 pairs, embeddings of both, and an image tower to train."""
    folder = tmp_path_factory.mktemp("kept")
    for name, captions in (("images", False), ("pairs", True)):
        write_tar(folder / name / "0.tar", shard_members(0, 16, captions=captions))
        embed_data(folder / name, tiny_model, folder / f"rows of {name}", text=captions)
    (folder / "student.json").write_text(json.dumps(STUDENT))
    return folder


def kept(place: Path, work: Path, data: str, **settings: Any) -> tuple[list[dict[str, Any]], str]:
    given = KEPT | {"student": str(place / "student.json"), "embeddings": (place / f"rows of {data}",)}
    return train(work, place / data, **given | settings)


def test_what_is_advised_in_place_of_the_teacher_can_be_typed() -> None:
    advised = name_no_teacher(DistillSettings(student="ViT-B-32", text_tower="teacher", preset="cid"))
    assert advised == "--teacher none without --text-tower teacher and --preset cid"
    assert name_no_teacher(DistillSettings(student="ViT-B-32")) == "--teacher none"


@pytest.mark.parametrize("online", [False, True])
def test_images_alone_train_an_image_tower(
    online: bool, place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the text tower runs or moves, and its scale does not either."""
    monkeypatch.setattr(PrunedForward, "encode_texts", None)
    log, told = kept(place, tmp_path, "images", online_teacher=online, ema=0.9, lr=0.01)
    assert "which clip and instance need: the run trains by fd alone." in told
    assert "16 samples" in told
    assert [list(line) for line in log] == [["step", "loss", "loss_fd", "lr", "gradient_norm", "scale_student"]] * 4
    assert log[-1]["loss_fd"] < log[0]["loss_fd"]
    teacher = load_file(tiny_model / WEIGHTS)
    students = [load_file(tmp_path / "distill" / "run" / name / WEIGHTS) for name in ("student", "student-ema")]
    for name in [name for name in teacher if not name.startswith("visual.")]:
        assert all(torch.equal(student[name], teacher[name]) for student in students), name
    assert not torch.equal(students[0]["visual.proj"], students[1]["visual.proj"])
    sidecar = json.loads((tmp_path / "distill" / "run" / "distill.json").read_text())
    assert sidecar["settings"]["text_tower"] == "teacher"
    checkpoint = torch.load(tmp_path / "distill" / "run" / "checkpoints" / "step_00000004.pt", weights_only=True)
    trained = sum(group["params"] != [] and len(group["params"]) for group in checkpoint["optimizer"]["param_groups"])
    assert trained == sum(name.startswith("visual.") for name in students[0])


def test_stored_rows_of_texts_find_images_of_the_student(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    """They are what the student makes of the texts, and its images are near those of their captions."""
    kept(place, tmp_path, "pairs", loss=("instance=1", "fd=0"), steps=40, lr=0.01, batch_size=16)
    stored = open_embeddings(place / "rows of pairs")
    texts = torch.from_numpy(np.array(stored.rows(Kind.TEXTS).read(0, 16))).float()
    student = load_model(parse_model(str(tmp_path / "distill" / "run" / "student")))
    captions = stored.captions_of(stored.files[0]).to_pylist()
    assert (student.encode_texts(student.tokenizer(captions), FP32) - texts).abs().max() < 6e-4
    assert student.logit_scale == pytest.approx(load_model(parse_model(str(tiny_model))).logit_scale, rel=1e-6)
    rows, batch = join(place / "pairs", place / "rows of pairs").show(student)
    ranks, _ = retrieval_ranks(student.encode_images(batch.pixels, FP32), texts[rows], torch.arange(16))
    assert (ranks == 0).float().mean() > 0.6


@pytest.mark.parametrize("data", ["images", "pairs"])
def test_what_fits_on_a_gpu_is_computed_without_captions(data: str, place: Path, tiny_model: Path) -> None:
    given = KEPT | {"student": str(place / "student.json"), "teacher": (str(tiny_model),)}
    run = join(place / data, place / f"rows of {data}", **given)
    student = load_student(run.settings, CPU)
    kept = sum(value.nbytes for value in student.model.module.parameters() if not value.requires_grad)
    memories = (kept, 4e9, 8e9)
    none, small, large = (fitting_batch(run.inputs.settings, student, run.inputs, memory) for memory in memories)
    assert large > small > none == 0, "the text tower is there beside what is trained"
    student.model.info.config["text_cfg"]["hf_model_name"] = "of/transformers"
    assert fitting_batch(run.inputs.settings, student, run.inputs, memories[-1]) == large


def test_the_report_shows_what_is_measured_of_images_alone(place: Path, tmp_path: Path) -> None:
    kept(place, tmp_path, "images", val_fraction=0.5, batch_size=4, eval_every=2, with_report=True)
    page = (tmp_path / "distill" / "run" / "report.html").read_text()
    assert "teacher recall at 1, held out (chance" in page
    assert "Recall on the held-out part" in page


def test_held_out_images_are_measured_by_the_teachers_rows_of_them(place: Path, tiny_model: Path) -> None:
    """The teacher finds all of its own; one that takes every image for the next one finds none."""
    run = join(place / "images", place / "rows of images", **KEPT | {"val_fraction": 0.5})
    images = HeldOutImages.read(run.inputs, load_model(parse_model(str(tiny_model))))
    assert images is not None
    assert images.measure(CPU) == {f"teacher_retrieval_recall@{k}": 1.0 for k in (1, 5, 10)}
    assert images.chance["teacher_retrieval_recall@1"] == 1 / run.inputs.held_out.total
    others = dataclasses.replace(images, teacher_ND=images.teacher_ND.roll(1, 0))
    assert others.measure(CPU)["teacher_retrieval_recall@1"] == 0.0


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"teacher": ("none",), "preset": "clip"}, "keeps the text tower of one teacher, and --teacher none has none"),
        ({"teacher": ("one", "two")}, "there are 2 teachers"),
        ({"freeze_image": True}, "not with --freeze-image"),
        ({"init_towers": "text", "init_from": "model"}, "not with --init-towers text"),
        ({"cluster_towers": "both", "preset": "cid"}, "not with --cluster-towers both"),
        ({"teacher_space": "project"}, "not with --teacher-space project"),
        ({"preset": "clip-td"}, "The loss td trains the text tower on its tokens"),
        ({"extra_texts": 4}, "not with --text-tower teacher"),
        ({"student_caption_key": ("fr.txt",)}, "not with --text-tower teacher"),
    ],
)
def test_what_does_not_go_with_a_kept_text_tower_is_wrong_usage(given: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UsageError, match=re.escape(wrong)):
        DistillSettings(student="student.json", text_tower="teacher", **given)


def test_rows_of_nobody_have_no_text_tower(place: Path, tmp_path: Path) -> None:
    unnamed = shutil.copytree(place / "rows of images", tmp_path / "rows", ignore=shutil.ignore_patterns("*.json"))
    settings = DistillSettings(student="student.json", text_tower="teacher", embeddings=(unnamed,))
    with pytest.raises(ClipcidError, match="does not record which model made it"):
        find_teacher(settings)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"preset": "clip"}, "holds no embeddings of captions, and they are needed by: clip"),
        ({"loss": ("icl=1",)}, "captions are needed by: icl"),
        ({"loss": ("icl=1",), "online_teacher": True}, "images has no captions, and they are needed by: icl"),
    ],
)
def test_losses_that_images_alone_cannot_serve_are_refused(given: dict[str, Any], wrong: str, place: Path) -> None:
    with pytest.raises(ClipcidError, match=wrong):
        join(place / "images", place / "rows of images", **KEPT | given)


def test_images_alone_are_told_how_they_can_be_trained_on(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    advice = "add --text-tower teacher"
    settings = DistillSettings(
        student="student.json", teacher=(str(tiny_model),), data=str(place / "images"), work=tmp_path
    )
    with pytest.raises(ClipcidError, match="no sample of the first shard has a caption") as refused:
        find_embeddings(settings, DistContext(0, 1, 0, CPU))
    assert advice in refused.value.fix
    with pytest.raises(ClipcidError, match="none of 16 samples has a caption") as refused:
        join(place / "images", place / "rows of images", preset=None)
    assert advice in refused.value.fix
    alone = dataclasses.replace(settings, text_tower="teacher", loss=("clip=0", "instance=0"))
    assert alone.name_losses(alone.losses) == "fd"
    assert settings.name_losses(settings.losses) == "fd-instance"
    for given in ({"freeze_image": True}, {"loss": ("icl=1",)}, {"preset": "clip"}, {"preset": "clip-td"}):
        assert dataclasses.replace(settings, **given).without_captions == ""
