"""`distill` with stored views or with its teacher beside it, in one process and in two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from teaching_data import write_student

Clipcid = Callable[..., Run]


def read_log(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / "clipcid-work" / "distill" / name / "train.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_two_processes_are_taught_as_one(
    clipcid: Clipcid, torchrun: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    write_student(tmp_path)
    clipcid("embed", tiny_shards, "--model", tiny_model, "--views", 2, "--crop-scale", 0.4, "--color-jitter", 0.2)
    common = ("distill", "--student", "student.json", "--preset", "clip-kd", "--batch-size", 8, "--steps", 6)
    for kind, flags in (("views", ()), ("online", ("--online-teacher", "--gray-probability", 0.3))):
        one = clipcid(*common, *flags, "--name", f"{kind}-one")
        torchrun(2, *common, *flags, "--name", f"{kind}-two")
        assert ("2 of each image are stored and replayed" in " ".join(one.stderr.split())) == (kind == "views")
        alone, together = read_log(tmp_path, f"{kind}-one"), read_log(tmp_path, f"{kind}-two")
        assert len(alone) == len(together) == 6
        for mine, ours in zip(alone, together, strict=True):
            for name in mine:
                if name.startswith("loss"):
                    assert ours[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-5), (kind, name)
    report = (tmp_path / "clipcid-work" / "distill" / "online-one" / "report.html").read_text()
    assert "run alongside the student" in report
