"""What a student in training is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model

from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.runtime.models.clip_model import load_model
from clipcid_cli.runtime.models.names import parse_model
from clipcid_cli.steps.distill.evaluation import Evaluation, HeldOut
from clipcid_cli.steps.evaluate.zeroshot import ZeroshotPlan


@pytest.mark.parametrize("is_there", [True, False])
def test_only_the_first_process_reads_the_held_out_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the second process reads")

    monkeypatch.setattr(HeldOut, "read", refuse)
    # What the first process says of its own.
    monkeypatch.setattr(DistContext, "broadcast", lambda *_: (is_there, None))
    student = load_model(parse_model(str(write_tiny_model(tmp_path / "tiny"))))
    nothing: Any = None
    second = DistContext(1, 2, 1, torch.device("cpu"))
    found = Evaluation(nothing, student, ZeroshotPlan([], [], nothing), second)
    assert found.held_out is None
    assert found.has_data == is_there
