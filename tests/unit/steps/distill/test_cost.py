"""What a dry run measures of a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
from balance_data import heard
from teaching_data import write_captions, write_student

from clipcid_cli.steps.distill import cost, run
from clipcid_cli.steps.distill.result import DistillCost
from clipcid_cli.steps.settings.distill import DistillSettings

# Takes some time for each sample, and notes how many there are.
SLOW = """
import time
def slow(batch):
    with open({path!r}, "a") as file:
        print(len(batch), file=file)
    time.sleep(0.004 * len(batch))
    return batch.image_BD.sum()
"""


@pytest.mark.parametrize(("enough", "timed", "how"), [(60.0, 4, "(medians of 3)"), (0.0, 1, "(medians of 1)")])
def test_fewer_steps_are_made_where_they_take_long(
    enough: float, timed: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_ENOUGH_SECONDS", enough)
    (tmp_path / "slow.py").write_text(SLOW.format(path=str(tmp_path / "sizes.txt")))
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
    assert [int(line) for line in (tmp_path / "sizes.txt").read_text().split()] == [80] * timed
    said = "\n".join(told)
    assert "Timing steps of 80 samples." in said
    assert how in said
    assert isinstance(found, DistillCost)
    assert found.seconds_per_step > 0.3, "the pauses alone take 0.32"
