"""What losses ask of the student beyond an image's and a caption's feature, and what processes share of its statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from balance_data import heard
from conftest import TINY_CONFIG, run_in_two
from distill_data import train
from teaching_data import write_student

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import Masking
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.evaluation import share_statistics
from clipcid_cli.steps.distill.student import load_student
from clipcid_cli.steps.settings.distill import DistillSettings

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}


def load(folder: Path, vision: dict[str, object], *losses: str) -> tuple[Masking | None, list[str]]:
    path = folder / "student.json"
    path.write_text(json.dumps(TINY_CONFIG | {"vision_cfg": vision}))
    settings = DistillSettings(student=str(path), preset="clip", loss=losses)
    with heard() as told:
        return load_student(settings, torch.device("cpu")).masking, told


def test_the_cost_of_masked_images_is_stated(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    assert load(tmp_path, vision) == (None, [])
    masking, said = load(tmp_path, vision, "mfd=1")
    assert masking == Masking(4, 16)
    assert said == ["mfd encodes each image once more, with 4 of its 16 patches: 29% more work for the image tower."]


@pytest.mark.parametrize("loss", ["mfd", "td"])
def test_an_image_tower_without_patches_is_refused(loss: str, tmp_path: Path) -> None:
    with pytest.raises(ClipcidError, match="ModifiedResNet"):
        load(tmp_path, RESNET, f"{loss}=1")
    assert load(tmp_path, RESNET, "fd=1") == (None, [])


def test_a_student_of_the_sigmoid_losses_keeps_its_bias(tiny_shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    """It is trained, written, and as a teacher's taught again; a student that has one goes on with it."""
    losses = ("clip=0", "siglip=1", "siglip-kd=1")
    common: dict[str, Any] = {"preset": "clip", "loss": losses, "lr": 0.01, "eval_every": 4}
    work, student = tmp_path / "work", write_student(tmp_path)
    log, _ = train(work, tiny_shards, teacher=(str(tiny_model),), student=str(student), **common)
    made = load_model(parse_model(str(work / "distill" / "run" / "student")))
    assert made.logit_bias == pytest.approx(log[-1]["bias_student"], abs=0.02)
    assert made.logit_bias != -10.0
    again, _ = train(
        work,
        tiny_shards,
        teacher=(made.info.spec,),
        student=made.info.spec,
        name="again",
        teacher_space="project",
        **common,
    )
    recorded = json.loads((work / "embeddings" / made.info.slug / "embed.json").read_text())["model"]
    assert recorded["logit_bias"] == made.logit_bias
    assert again[0]["bias_student"] == pytest.approx(made.logit_bias, abs=0.02)
    teachers = (made.info.spec, str(tiny_model))
    given = common | {"name": "two", "teacher_space": "project", "steps": 1, "eval_every": 1}
    _, said = train(work, tiny_shards, teacher=teachers, student=str(tiny_model), **given)
    assert "siglip-kd takes the softmax of the teachers" in said
    assert "a new logit scale: 14.3 → 10." in said


def share(rank: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return a process's own running mean, and the buffers that it has once the statistics are shared."""
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(5))
    norm(torch.randn(12, 5, generator=torch.Generator().manual_seed(rank)))
    own = norm[0].running_mean.numpy().copy()
    share_statistics(norm, DistContext(rank, 2, rank, torch.device("cpu")))
    return own, [buffer.numpy() for buffer in norm.buffers()]


def test_students_are_written_with_the_statistics_of_the_first_process(tmp_path: Path) -> None:
    (first, shared), (other, also_shared) = run_in_two(share, tmp_path)
    assert not np.array_equal(first, other)
    for one, another in zip(shared, also_shared, strict=True):
        np.testing.assert_array_equal(one, another)
