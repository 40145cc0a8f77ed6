"""A teacher that runs alongside the student: the same views and captions at its size, the targets its embeddings give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG, write_tiny_model
from teaching_data import (
    embed_data,
    encode_shown,
    join,
    train,
    write_student,
)

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime.models.clip_model import ClipModel, load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps import cluster
from clipcid_cli.steps.settings.cluster import ClusterSettings


@pytest.fixture(scope="module")
def work(tiny_shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory with the tiny teacher's embeddings and four clusters."""
    work = tmp_path_factory.mktemp("online") / "work"
    embed_data(tiny_shards, tiny_model, work / "embeddings" / "tiny")
    cluster.run(ClusterSettings(work=work, num_clusters=4, iterations=3, device="cpu"))
    return work


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> ClipModel:
    return load_model(parse_model(str(tiny_model)))


def test_it_sees_what_the_student_sees_with_its_own_eyes(tiny_shards: Path, teacher: ClipModel, work: Path) -> None:
    augmentation = {"crop_scale": 0.3, "color_jitter": 0.5, "gray_probability": 0.2}
    run = join(tiny_shards, work / "embeddings" / "tiny", online_teacher=True, **augmentation)
    config: dict[str, Any] = TINY_CONFIG | {"text_cfg": TINY_CONFIG["text_cfg"] | {"context_length": 7}}
    config["vision_cfg"] = TINY_CONFIG["vision_cfg"] | {"image_size": 48}
    larger = load_model(parse_model(str(write_tiny_model(work.parent / "other", config))))
    for model in (teacher, larger):
        _, batch = run.show(teacher, 1, model)
        size, length = model.info.image_size[0], model.info.context_length
        assert batch.teacher_pixels is not None
        assert batch.teacher_tokens is not None
        assert batch.teacher_pixels.shape == (24, size, size, 3)
        assert batch.teacher_tokens.shape == (24, length)
        told = run.teach(batch, 32, model)
        expected = encode_shown(model, run.show(model, 1)[1])
        for one, other in zip(told, expected, strict=False):
            np.testing.assert_allclose(one.numpy(), other, atol=1e-5)
        assert not told[0].is_inference(), "the losses must be able to keep it for their gradients"
    # Same view, another size: the larger picture made small is the smaller one, but for the filter.
    small = torch.nn.functional.interpolate(batch.teacher_pixels.permute(0, 3, 1, 2).float(), 32, mode="area")
    assert (small - batch.pixels.permute(0, 3, 1, 2)).abs().mean() < 8


def test_training_beside_it_is_training_from_its_embeddings(
    tiny_shards: Path, tiny_model: Path, work: Path, tmp_path: Path
) -> None:
    # Stored rows are compared with in fp32: bf16, which `auto` takes on CPUs with matrix units, is off by more.
    common = {"student": str(write_student(tmp_path)), "crop_scale": 1.0, "teacher_space": "pca"}
    common |= {"precision": "fp32", "preset": "cid"}
    stored, _ = train(work, tiny_shards, name="stored", **common)
    online, said = train(work, tiny_shards, name="online", teacher=(str(tiny_model),), online_teacher=True, **common)
    assert "Online teacher: 1.6 M parameters, 32 px, 12 tokens" in said
    for one, other in zip(stored, online, strict=True):
        for name in ("loss", "loss_clip", "loss_instance", "loss_cluster"):
            assert other[name] == pytest.approx(one[name], abs=2e-3), name
    assert online != stored, "rows are not rounded to float16 on the way"
    other = write_tiny_model(tmp_path / "other", seed=3)
    with pytest.raises(
        ClipcidError, match=r"clusters in .* weights blake2b.*the teacher is .*, weights blake2b"
    ) as raised:
        train(work, tiny_shards, name="third", teacher=(str(other),), online_teacher=True, **common)
    assert f"clipcid embed {tiny_shards} --model {other}" in raised.value.fix
