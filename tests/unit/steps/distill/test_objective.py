"""What losses ask of the student beyond an image's and a caption's feature, and what processes share of its statistics."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY_CONFIG, process_context
from teaching_data import ALONE, heard, train, write_student

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace
from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.augment import Masking
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.evaluation import share_statistics
from clipcid_cli.steps.distill.student import load_student
from clipcid_cli.steps.distill.trainer import Objective
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.training.gradients import Features

BATCH, WIDTH, TEACHER_WIDTH = 12, 6, 9
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


def test_masks_depend_on_their_seed_and_hide_three_quarters() -> None:
    masking = Masking.of(0.75, 49)
    drawn = [masking.choose(seed) for seed in range(300)]
    assert all(len(set(kept.tolist())) == 12 and (np.diff(kept) > 0).all() for kept in drawn)
    np.testing.assert_array_equal(masking.choose(5), drawn[5])
    # Each patch is seen about equally often: 300 · 12/49 = 73 times, with a standard deviation of 7.4.
    counts = np.bincount(np.concatenate(drawn), minlength=49)
    assert 40 < counts.min() <= counts.max() < 110
    assert Masking.of(0.75, 1) == Masking(1, 1)


def test_masked_images_reach_no_other_loss() -> None:
    """Neither the value nor the gradients of the other losses depend on them."""
    weights = {name: 1.0 for name, entry in LOSSES.items() if not entry.needs_clusters}
    space = SharedSpace(TEACHER_WIDTH, is_learned=True)
    rows = torch.nn.functional.normalize(torch.randn(2, BATCH, TEACHER_WIDTH), dim=2)
    teacher: Any = SimpleNamespace(space=space, scale=30.0, bias=None, rows=lambda _: (*rows, None))
    batch: Any = SimpleNamespace(image_clusters=None, text_clusters=None)
    parameters = LossParameters(weights, WIDTH, space, 1)
    objective = Objective(weights | {"mfd": 0.0}, parameters, teacher, ALONE, 100.0, False)
    image, text = torch.randn(2, BATCH, WIDTH)

    def losses(masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = Features(image, text, masked.requires_grad_(), image[:, None], text[:, None])
        others, found = objective(features, torch.tensor(5.0), torch.tensor(-5.0), batch)
        return found, torch.autograd.grad(others, masked)[0]

    (some, gradient), (other, _) = losses(torch.ones(BATCH, WIDTH)), losses(torch.eye(BATCH, WIDTH))
    assert gradient.abs().sum() == 0
    assert [name for name, one, two in zip(weights, some, other, strict=True) if one != two] == ["mfd"]


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


def share(rank: int, store: str, results: multiprocessing.Queue[Any]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        norm = torch.nn.Sequential(torch.nn.BatchNorm1d(5))
        norm(torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(rank)))
        own = norm[0].running_mean.numpy().copy()
        share_statistics(norm, DistContext(rank, 2, rank, torch.device("cpu")))
        results.put((rank, (own, [buffer.numpy() for buffer in norm.buffers()])))
    finally:
        dist.destroy_process_group()


def test_students_are_written_with_the_statistics_of_the_first_process(tmp_path: Path) -> None:
    context = process_context()
    results = context.Queue()
    workers = [context.Process(target=share, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert not np.array_equal(found[0][0], found[1][0])
    for first, other in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_array_equal(first, other)
