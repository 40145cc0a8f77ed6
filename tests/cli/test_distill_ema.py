"""`distill --ema` and `export --ema` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from distill_data import SHORT, losses, student_bytes
from safetensors.numpy import load_file

Clipcid = Callable[..., Run]
WEIGHTS = "open_clip_model.safetensors"


def test_the_average_is_measured_written_and_exported(
    clipcid: Clipcid, distill_place: Path, tiny_model: Path, tiny_shards: Path
) -> None:
    given = ("distill", *SHORT, "--preset", "clip", "--steps", 6, "--eval-every", 3, "--optimizer", "adamw")
    result = clipcid(*given, "--name", "a", "--ema", 0.9, "--eval-data", tiny_shards, "--json").json
    run = distill_place / "clipcid-work" / "distill" / "a"
    assert result["files"]["student_ema"] == "clipcid-work/distill/a/student-ema"
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    for line in lines:
        own = {name for name in line if not name.startswith("ema/")} - {"step"}
        assert {f"ema/{name}" for name in own} == line.keys() - own - {"step"}
    assert all(lines[0][f"ema/{name}"] == lines[0][name] for name in own)
    # What training measured is what the written folders score.
    assert [one["model"] for one in result["evaluations"]] == ["a-student", "a-student-ema"]
    for one, prefix in zip(result["evaluations"], ("", "ema/"), strict=True):
        for name, value in one["metrics"].items():
            assert lines[-1][f"{prefix}{tiny_shards.name}/{name}"] == pytest.approx(value, abs=1e-6)
    student, average = (load_file(run / name / WEIGHTS) for name in ("student", "student-ema"))
    assert student.keys() == average.keys()
    assert not np.array_equal(student["visual.proj"], average["visual.proj"])
    report = (run / "report.html").read_text()
    assert "Student and average (EMA)" in report

    # Keeping it changes nothing of what is learned, and how a batch is encoded nothing of it.
    shown = clipcid(*given, "--name", "b").stderr
    assert ", EMA" not in shown
    assert student_bytes(run.parent / "b") == student_bytes(run)
    shown = clipcid(*given, "--name", "parts", "--ema", 0.9, "--accum-freq", 2).stderr
    assert "held out, EMA  image R@1" in shown
    parts = load_file(run.parent / "parts" / "student-ema" / WEIGHTS)
    for name, tensor in average.items():
        np.testing.assert_allclose(parts[name], tensor, rtol=1e-3, atol=1e-5, err_msg=name)
    assert len(losses(run.parent / "parts")) == 6

    (distill_place / "link").symlink_to(run / "student")
    exported = clipcid("export", "link", "--ema", "--json").json
    folder = distill_place / "clipcid-work" / "export" / "a-ema"
    assert exported["model"] == "clipcid-work/distill/a/student-ema"
    written = load_file(folder / WEIGHTS)
    assert all(np.array_equal(written[name], tensor) for name, tensor in average.items())
    card = (folder / "README.md").read_text()
    assert "an exponential moving average of those in training (decay 0.9)" in card
    metrics = result["evaluations"][1]["metrics"]["image_retrieval_recall@10"]
    assert f"| image_retrieval_recall@10 | {metrics:.4f} |" in card
    plain = clipcid("export", result["student"], "--json").json
    assert "moving average" not in (distill_place / plain["files"]["README"]).read_text()

    for model, message in (
        ("clipcid-work/distill/b/student", "kept no average of the weights"),
        (tiny_model, "is no student of clipcid distill"),
    ):
        refused = clipcid("export", model, "--ema", check=False)
        assert refused.returncode == 1
        assert message in " ".join(refused.stderr.split())
        assert "clipcid distill --ema DECAY" in " ".join(refused.stderr.split())
    with (run / "student-ema" / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    refused = clipcid("export", result["student"], "--ema", check=False)
    assert refused.returncode == 1
    assert "has changed since" in " ".join(refused.stderr.split())
    (run / "distill.json").unlink()
    refused = clipcid("export", result["student"], "--ema", check=False)
    assert "no student of clipcid distill" in " ".join(refused.stderr.split())
    for decay in ("0", "1", "nan"):
        assert clipcid(*given, "--ema", decay, check=False).returncode == 2
