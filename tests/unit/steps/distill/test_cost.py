"""What a dry run measures of a training run, and what a host has too little memory for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from balance_data import heard
from distill_data import train
from teaching_data import ALONE, embed_data, write_captions, write_student

from clipcid_cli.errors import ClipcidError
from clipcid_cli.runtime import pipeline
from clipcid_cli.runtime.pipeline import host_memory_of
from clipcid_cli.steps.distill import cost, memory, run
from clipcid_cli.steps.distill.memory import validate_memory
from clipcid_cli.steps.distill.plan import make_plan
from clipcid_cli.steps.distill.result import DistillCost
from clipcid_cli.steps.distill.student import load_student
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


def test_what_a_host_has_too_little_memory_for_is_refused_before_it_is_begun(
    tiny_shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = write_student(tmp_path)
    monkeypatch.setattr(pipeline, "memory_limit", lambda: 10**6)
    with pytest.raises(ClipcidError, match=r"workers of this host and their batches take up to .* it has 0\.0 GB"):
        embed_data(tiny_shards, tiny_model, tmp_path / "rows")
    assert not list((tmp_path / "rows").glob("**/*.npy"))
    settings = {"student": student, "teacher": ("none",), "preset": "clip"}
    with pytest.raises(ClipcidError, match=r"the copy that a checkpoint is written from take up to") as refused:
        train(tmp_path / "work", tiny_shards, **settings)
    assert "a larger --accum-freq" in refused.value.fix
    assert not (tmp_path / "work" / "distill").exists()


def test_of_compiled_towers_only_what_stays_between_steps_is_counted(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they keep for the backward pass is not known: a batch that fits would be refused."""
    taken = list[int]()
    monkeypatch.setattr(memory, "host_memory", lambda plan, student, context, coming: taken.append(coming))
    settings = DistillSettings(
        work=tmp_path / "work",
        data=str(tiny_shards),
        student=write_student(tmp_path),
        teacher=("none",),
        preset="clip",
        epochs=1,
    )
    student = load_student(settings, ALONE.device)
    plan = make_plan(settings, student, (), None, tmp_path, ALONE, [None])
    for compiles in (False, True):
        chosen = dataclasses.replace(settings, torchcompile=compiles)
        for samples in (8, 16):
            validate_memory(dataclasses.replace(plan, settings=chosen, batch_size=samples), student, ALONE)
    few, many, few_compiled, many_compiled = taken
    assert many > few > few_compiled == many_compiled > 0


def test_a_checkpoint_in_work_and_steps_to_come_are_counted() -> None:
    usual = host_memory_of(10, 100, 2)
    more = host_memory_of(10, 100, 2, training=2**30, checkpoint=2**32)
    assert more.total - usual.total == pytest.approx(2**30 + 2**32, rel=0.05)  # this process grows meanwhile
    assert host_memory_of(10, 100, 20, num_items=3).shared == 30 < host_memory_of(10, 100, 20).shared
