"""What the time of a training goes to: each phase is counted once, and what is not known is left out."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from distill_data import train
from teaching_data import write_student

from clipcid_cli.formats.results.run_folder import PHASES
from clipcid_cli.runtime.phase_timer import PhaseTimer
from clipcid_cli.steps.distill.pace import Pace


def test_a_line_counts_the_seconds_since_the_line_before() -> None:
    copied = 1.0
    pace = Pace(3, 10, lambda: copied, full_speed=1e6)
    with pace.phase("data_wait"):
        time.sleep(0.02)
    pace.add({"forward_backward": 0.5, "optimizer": 0.25})
    copied = 1.5
    first, second = pace.measure(4), pace.measure(5)
    assert first.seconds | {"data_wait": 0} == dict.fromkeys(PHASES, 0) | {
        "copy": 0.5,
        "forward_backward": 0.5,
        "optimizer": 0.25,
    }
    assert 0.02 <= first.seconds["data_wait"] < 5
    assert second.seconds == dict.fromkeys(PHASES, 0)
    assert first.mfu == pytest.approx(first.samples_per_second / 1e6)
    assert first.line()["mfu"] == pytest.approx(first.samples_per_second / 1e6, rel=1e-3)
    assert second.waiting > 0, "the share is of the whole run"


def test_a_phase_is_the_time_between_two_marks() -> None:
    timer = PhaseTimer(torch.device("cpu"))
    for _ in range(2):
        timer.start()
        time.sleep(0.02)
        timer.finish("slow")
        timer.finish("fast")
    seconds = timer.take().read()
    assert seconds["slow"] >= 0.04 > 10 * seconds["fast"]
    assert timer.take().read() == {}


def test_a_run_logs_its_phases(tiny_shards: Path, tmp_path: Path) -> None:
    settings = {"student": write_student(tmp_path), "teacher": ("none",), "preset": "clip"}
    began = time.perf_counter()
    train(tmp_path / "work", tiny_shards, **settings, eval_every=2, checkpoint_every=2)
    passed = time.perf_counter() - began
    log = tmp_path / "work" / "distill" / "run" / "train.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["seconds_evaluation"] > 0 for line in lines] == [False, False, True, False]
    assert [line["seconds_checkpoint"] > 0 for line in lines] == [False, False, True, False]
    assert sum(line["seconds_data_wait"] for line in lines) > 0
    assert sum(line["seconds_copy"] for line in lines) > 0
    for line in lines:
        assert min(line[f"seconds_{phase}"] for phase in ("forward_backward", "optimizer")) > 0
        assert "mfu" not in line, "a CPU's rate of products is on no data sheet"
    assert sum(value for line in lines for name, value in line.items() if name.startswith("seconds_")) < passed
