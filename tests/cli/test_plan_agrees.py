"""A plan for the device at hand, computed from its measured rates, beside real steps of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Clipcid

_TRAINING = ("--student", "ViT-S-32-alt", "--teacher", "none", "--val-fraction", 0, "--batch-size", 24, "--steps", 4)
_ROUNDS = 2


@pytest.mark.slow
def test_a_plan_for_this_machine_agrees_with_real_steps(clipcid: Clipcid, tiny_shards: Path) -> None:
    """Of a few rounds the shortest counts on both sides: other programs can only lengthen a step, or lower a rate."""
    planned, taken = list[float](), list[float]()
    for _ in range(_ROUNDS):
        plan = clipcid("distill", tiny_shards, *_TRAINING, "--dry-run", "--gpus", "this", "--json").json
        cost = clipcid("distill", tiny_shards, *_TRAINING, "--dry-run", "--json").json
        assert (plan["batch_size"], plan["steps"]) == (24, 4)
        planned.append(plan["seconds_per_step"])
        taken.append(cost["seconds_per_step"] - cost["data_seconds_per_step"])  # without workers one follows the other
    assert min(planned) == pytest.approx(min(taken), rel=0.25), (planned, taken)
