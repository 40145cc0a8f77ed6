"""`distill` with stored views or with its teacher beside it, in one process and in two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, shard_members, write_tar
from teaching_data import write_student

Clipcid = Callable[..., Run]


def read_log(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / "clipcid-work" / "distill" / name / "train.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_what_was_not_embedded_is_left_out_beside_an_online_teacher(
    clipcid: Clipcid, tiny_model: Path, tmp_path: Path
) -> None:
    members = [*shard_members(0, 23), ("bad.png", b"no image"), ("bad.txt", b"a damaged one")]
    data = write_tar(tmp_path / "a.tar", members)
    write_student(tmp_path)
    clipcid("embed", data, "--model", tiny_model, "--max-bad-fraction", 0.1)
    clipcid("cluster", "--num-clusters", 4, "--iterations", 2)
    command = (
        "distill",
        "--student",
        "student.json",
        "--preset",
        "cid",
        "--steps",
        2,
        "--batch-size",
        8,
        "--workers",
        0,
    )
    command += ("--val-fraction", 0, "--online-teacher")
    taught = clipcid(*command, "--max-bad-fraction", 0.1)
    assert "1 of 24 samples to train on are not in clipcid-work/clusters: they are left out." in " ".join(
        taught.stderr.split()
    )
    assert "23 samples, 2 steps" in taught.stderr
    refused = clipcid(*command, "--max-bad-fraction", 0.01, "--name", "other", check=False)
    assert refused.returncode == 1
    assert "or these could not be embedded (--max-bad-fraction)" in " ".join(refused.stderr.split())


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--student", "nowhere.json"), "nowhere.json"),
        (("--student", "student.json", "--eval-data", "nowhere"), "--eval-data: There is no data at"),
        (("--student", "student.json", "--keep-list", "nowhere.parquet"), "no keep list nowhere.parquet"),
        (("--student", "student.json", "--preset", "cid"), "clipcid cluster"),
    ],
    ids=str,
)
def test_what_is_missing_is_told_before_anything_is_embedded(
    flags: tuple[str, ...],
    message: str,
    clipcid: Callable[..., Run],
    tiny_shards: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    write_student(tmp_path)
    refused = clipcid("distill", tiny_shards, "--teacher", tiny_model, *flags, check=False)
    assert refused.returncode == 1
    assert message in " ".join(refused.stderr.split())
    assert not (tmp_path / "clipcid-work" / "embeddings").exists()
