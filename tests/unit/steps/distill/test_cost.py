"""What a dry run measures of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from balance_data import heard
from teaching_data import write_captions, write_student

from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill import cost, run
from clipcid_cli.steps.settings.distill import DistillSettings

# Takes some time for each sample, and notes how many there are.
SLOW = """
import time
def slow(batch):
    with open({path!r}, "a") as file:
        print(len(batch), file=file)
    time.sleep({pause} * len(batch))
    return batch.image_BD.sum()
"""


@pytest.mark.parametrize(
    ("pause", "longest_step", "sizes", "how"),
    [
        (0.01, 0.02, [8, 8, 64], "(estimated from parts of a batch, 8 and 64 samples)"),
        (0.0, 60.0, [8, 8, 80, 80, 80, 80], "(medians of 3)"),
    ],
)
def test_whole_steps_are_made_only_where_they_are_short(
    pause: float,
    longest_step: float,
    sizes: list[int],
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "_LONGEST_STEP", longest_step)
    (tmp_path / "slow.py").write_text(SLOW.format(path=str(tmp_path / "sizes.txt"), pause=pause))
    with heard() as told:
        found = run.run(
            DistillSettings(
                work=tmp_path / "work",
                data=str(write_captions(tmp_path / "data", (1,) * 80)),
                student=write_student(tmp_path),
                teacher=("none",),
                preset="clip",
                loss=(f"{tmp_path / 'slow.py'}:slow=1",),
                batch_size=80,
                steps=2,
                workers=0,
                device="cpu",
                dry_run=True,
            )
        )
    assert [int(line) for line in (tmp_path / "sizes.txt").read_text().split()] == sizes
    said = "\n".join(told)
    assert "Timing steps of 80 samples." in said
    assert how in said
    assert isinstance(found, cost.DistillCost)
    if pause:
        assert found.seconds_per_step == pytest.approx(80 * pause, rel=0.5), "nearly all of it are the pauses"


@pytest.mark.parametrize(("longest_step", "sizes"), [(0.0, [8, 8]), (60.0, [8, 8, 20, 20, 20, 20])])
def test_a_teacher_that_takes_long_is_timed_on_few_samples(
    longest_step: float, sizes: list[int], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_LONGEST_STEP", longest_step)
    teacher = load_model(parse_model(str(tiny_model)), torch.device("cpu"))
    shown = list[int]()
    teacher.module.visual.conv1.register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[0])))
    images, texts = cost._time_teacher(teacher, 20, "fp32")
    assert shown == sizes
    assert min(images, texts) > 0
