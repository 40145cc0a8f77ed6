"""Losses from the user's own files: what they are given, how they are checked, and that nothing else runs them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Clipcid, make_caption, make_image, run_clipcid, write_tar
from distill_data import SHORT, losses, train
from PIL import Image
from teaching_data import Run, write_student

from clipcid_cli.algorithms.losses.registry import SAMPLE_INPUTS
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.loss_file import read_loss_file
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.inputs import find_inputs
from clipcid_cli.steps.distill.own_losses import load_own_loss
from clipcid_cli.steps.distill.sample_inputs import COMPUTE
from clipcid_cli.steps.evaluate import zeroshot
from clipcid_cli.steps.settings.distill import DistillSettings
from clipcid_cli.steps.settings.eval_zeroshot import EvalZeroshotSettings

COPY = """
import dataclasses
from clipcid_cli.algorithms.losses.contrastive import clip

@dataclasses.dataclass
class Options:
    weight: float = 1.0

def mine(batch):
    return Options().weight * clip(batch)
"""
TAUGHT = """
import torch
import torch.nn.functional as F

def taught(batch, scale, height):
    logits = scale * batch.image_BD[batch.own] @ batch.teacher_text_BD.T
    matching = torch.arange(len(batch))[batch.own]
    losses = F.cross_entropy(logits, matching, reduction="none")
    return (height[batch.own] * losses).sum() / height.sum()
"""


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "mine", "cannot be read: No such file"),
        ("def mine(batch:\n", "mine", "line 1 is not Python"),
        ("def other(batch): ...\n", "mine", "defines no function 'mine'.\nIts functions are: other."),
        ("def mine(batch, temperature): ...\n", "mine", r"mine\(batch, temperature\) cannot be called as a loss"),
        ("def mine(): ...\n", "mine", r"mine\(\) cannot be called as a loss"),
        ("def clip(batch): ...\n", "clip", "another loss is called clip, too"),
    ],
)
def test_what_cannot_be_a_loss_is_refused_at_once(source: str | None, name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my_losses.py"
    if source is not None:
        path.write_text(f"{source}raise SystemExit('it ran')\n")
    with pytest.raises(UsageError, match=message):
        DistillSettings(student="s", teacher=("none",), loss=(f"{path}:{name}=1",))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return rows.sum(1)", r"returned a tensor of float32 \[3\], not a tensor of one floating-point number"),
        ("return rows.sum().long()", r"returned a tensor of int64 \[\]"),
        ("return rows.detach().sum().item()", "returned float, not a tensor"),
        ("print('ok')", "returned NoneType, not a tensor"),
        ("return rows.detach().sum()", "does not depend on the student"),
        ("return rows.mean() / (1 // 0)", "failed, line 2: ZeroDivisionError"),
    ],
)
def test_what_a_loss_may_not_return_is_one_error(body: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my_losses.py"
    path.write_text(f"def mine(rows):\n    {body}\n")
    compute = load_own_loss(read_loss_file(f"{path}:mine"))
    with pytest.raises(ClipcidError, match=message):
        compute(torch.ones(3, 2, requires_grad=True))


@pytest.mark.parametrize(
    ("precision", "fix"),
    [("fp32", "Lower --lr or lengthen --warmup. Either"), ("bf16", "Lower --lr, lengthen --warmup, or train in --pre")],
)
def test_a_loss_that_is_not_finite_is_named(precision: str, fix: str, tmp_path: Path, tiny_shards: Path) -> None:
    path = tmp_path / "my_losses.py"
    path.write_text("def mine(batch):\n    return batch.image_BD.sum() * float('nan')\n")
    settings: dict[str, Any] = {"student": str(write_student(tmp_path)), "preset": "clip", "teacher": ("none",)}
    settings |= {"loss": (f"{path}:mine=1",), "precision": precision, "steps": 1}
    with pytest.raises(ClipcidError, match=r"loss nan \(mine nan; the others are finite\), gradient") as raised:
        train(tmp_path / "work", tiny_shards, **settings)
    assert raised.value.fix.startswith(fix)


def test_a_file_that_fails_is_told_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "my_losses.py"
    path.write_text("import no_such_module\ndef mine(batch): ...\n")
    settings: dict[str, Any] = {"student": str(write_student(tmp_path)), "preset": "clip", "teacher": ("none",)}
    with pytest.raises(ClipcidError, match="cannot be loaded, line 1: ModuleNotFoundError"):
        train(tmp_path / "work", tmp_path / "nowhere", **settings, loss=(f"{path}:mine=1",))


def test_a_loss_trains_as_its_formula_and_only_where_it_was_typed(tmp_path: Path, tiny_shards: Path) -> None:
    path = tmp_path / "my_losses.py"
    path.write_text(COPY)
    work = tmp_path / "work"
    given: dict[str, Any] = {"student": str(write_student(tmp_path)), "preset": "clip", "teacher": ("none",)}
    built_in, _ = train(work, tiny_shards, **given, name="built-in")
    given |= {"loss": ("clip=0", f"{path}:mine=1"), "name": "own"}
    own, told = train(work, tiny_shards, **given)
    assert "Loss: 1·mine." in told
    assert [line["loss_mine"] for line in own] == [line["loss_clip"] for line in built_in]

    # The source identifies it, not its place.
    moved = path.rename(tmp_path / "other.py")
    _, again = train(work, tiny_shards, **given | {"loss": ("clip=0", f"{moved}:mine=1")})
    assert "holds this run already" in again
    moved.write_text(COPY + "# changed\n")
    with pytest.raises(ClipcidError, match="loss_sources"):
        train(work, tiny_shards, **given | {"loss": ("clip=0", f"{moved}:mine=1")})
    # A run that names it is evaluated without it.
    for file in (path, moved):
        file.write_text("raise SystemExit('it ran')\n")
    assert "mine" in json.loads((work / "distill" / "own" / "distill.json").read_text())["settings"]["losses"]
    model = str(work / "distill" / "own" / "student")
    zeroshot.run(EvalZeroshotSettings(work=work, model=model, device="cpu", workers=0))


def test_numbers_of_samples_come_with_a_batch(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "my_losses.py"
    path.write_text("def mine(batch, height): ...\ndef other(batch, scale, width): ...\n")
    members = []
    for number in range(4):
        file = io.BytesIO()
        Image.new("RGB", (40 + number, 30 + number)).save(file, "JPEG")
        members += [(f"{number}.jpg", file.getvalue()), (f"{number}.txt", b"a caption")]
    write_tar(tmp_path / "data.tar", members)
    settings = DistillSettings(
        work=tmp_path / "work",
        data=str(tmp_path / "data.tar"),
        student="student.json",
        teacher=("none",),
        loss=(f"{path}:mine=1", f"{path}:other=1"),
        keep_list="none",
        val_fraction=0.0,
        workers=0,
    )
    rows, batch = Run(settings, find_inputs(settings, (), None)).show(load_model(parse_model(str(tiny_model))))
    assert sorted(rows) == [0, 1, 2, 3]
    assert batch.sample_inputs_bn is not None
    assert batch.sample_inputs_bn.tolist() == [[40 + row, 30 + row] for row in rows]
    assert COMPUTE.keys() == {*SAMPLE_INPUTS}


def test_several_processes_share_a_loss_and_its_scale(distill_place: Path, torchrun: Clipcid) -> None:
    (distill_place / "my_losses.py").write_text(TAUGHT)
    sides = [(f"{number:06d}.png", make_image(number, side=40 + number)) for number in range(24)]
    captions = [(f"{number:06d}.txt", make_caption(number).encode()) for number in range(24)]
    write_tar(distill_place / "sides.tar", sorted(sides + captions))
    given = (
        "distill",
        "sides.tar",
        *SHORT,
        "--preset",
        "clip",
        "--loss",
        "my_losses.py:taught=0.5",
        "--steps",
        3,
        "--lr",
        1e-4,
    )
    run_clipcid(*given, "--name", "one", cwd=distill_place)
    torchrun(2, *given, "--name", "two")
    one, two = (losses(distill_place / "clipcid-work" / "distill" / name) for name in ("one", "two"))
    assert [line["loss_taught"] for line in two] == pytest.approx([line["loss_taught"] for line in one], rel=1e-5)
    assert [line["scale_taught"] for line in two] == pytest.approx([line["scale_taught"] for line in one], rel=1e-5)
    assert one[-1]["scale_taught"] != one[0]["scale_taught"]
