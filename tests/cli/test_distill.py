"""`distill` from the command line: what it writes, what it refuses of other steps' files, and its average (`--ema`)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_CONFIG, Clipcid, shard_members, write_tar
from distill_data import SHORT, STUDENT, losses, student_bytes
from safetensors.numpy import load_file
from sidecars import unfinish

from clipcid_cli.formats.results.run_folder import read_lines
from clipcid_cli.runtime.models.load import load_model
from clipcid_cli.runtime.models.names import parse_model

WEIGHTS = "open_clip_model.safetensors"


def test_writes_a_student_that_open_clip_loads_alone(clipcid: Clipcid, distill_place: Path) -> None:
    call = ("distill", *SHORT, "--name", "a", "--json", "--steps")
    result = clipcid(*call, 6).json
    run = distill_place / "clipcid-work" / "distill" / "a"
    assert (result["steps"], result["samples"], set(result["losses"])) == (6, 48, {"clip", "instance", "cluster"})
    assert 0 <= result["metrics"]["image_retrieval_recall@1"] <= 1
    for name in result["files"].values():
        assert (distill_place / name).exists()
    assert [line["step"] for line in losses(run)] == [1, 2, 3, 4, 5, 6]
    for dry in ((), ("--dry-run",)):
        refused = clipcid(*call, 7, *dry, code=1)
        assert "settings.steps: 6 there, 7 now" in refused.stderr
        assert "write elsewhere (--name)" in refused.said
    # Its model card says what the sidecars of the run say.
    card = distill_place / clipcid("export", "--json").json["files"]["README"]
    lines = [line.strip("| ").split(" | ") for line in card.read_text().splitlines() if line.startswith("| ")]
    known = dict(fact for fact in lines if len(fact) == 2)
    assert known["Teacher"] == "tiny"
    assert re.search(r" of 24 samples used, \d+ more held out$", known["Training data"])
    assert known["Keep ratio"] == "1 (not balanced)"
    assert known["Losses"] == "clip × 1, instance × 1, cluster × 0.5"
    assert known["Training"] == "6 steps, 48 samples"
    report = (run / "report.html").read_text()
    assert "Retrieval examples" in report
    assert not re.findall(r"http(?!-equiv|://(?:www\.w3|purl|creativecommons)\.org)", report)
    student, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run / 'student'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{run / 'student'}")(["a red drawing"])
    assert student.encode_text(tokens).shape == (1, STUDENT["embed_dim"])
    assert "finished" in clipcid(*call, 6).stderr
    # Killed after its last checkpoint and before its sidecar, a run only has its results written again.
    weights = student_bytes(run)
    unfinish(run, "distill")
    again = clipcid(*call, 6).json
    assert (again["losses"], again["metrics"]) == (result["losses"], result["metrics"])
    assert student_bytes(run) == weights


def test_needs_no_teacher_for_preset_clip(clipcid: Clipcid, tmp_path: Path, tiny_shards: Path) -> None:
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    arguments = ("distill", tiny_shards, *SHORT, "--teacher", "none", "--preset", "clip", "--steps", 3)
    result = clipcid(*arguments, "--wd", 0.5, "--lr", 0.1, "--warmup", 0, "--json").json
    assert set(result["losses"]) == {"clip"}
    recorded = json.loads(Path(tmp_path / result["files"]["sidecar"]).read_text())["settings"]
    assert not {"text_tower", "student_caption_key"} & recorded.keys(), "runs from before there were these go on"
    assert not (tmp_path / "clipcid-work" / "embeddings").exists()
    # Tokens that no caption uses are decayed as AdamW decays a row without gradient, by Π(1 − lr·wd).
    first = load_model(parse_model(str(tmp_path / "student.json")), fresh_seed=0).module.state_dict()
    trained = load_file(tmp_path / result["student"] / WEIGHTS)
    name, unused = "token_embedding.weight", 40_000
    rates = [0.05 * (1 + np.cos(np.pi * step / 3)) for step in range(3)]
    expected = first[name][unused] * float(np.prod([1 - 0.5 * rate for rate in rates]))
    torch.testing.assert_close(torch.from_numpy(trained[name][unused]), expected)
    assert trained[name].shape == (TINY_CONFIG["text_cfg"]["vocab_size"], 16)


def test_divergence_stops_with_the_keys_of_the_batch(clipcid: Clipcid, distill_place: Path) -> None:
    # The preset that needs no teacher takes its data from where the embeddings were made of.
    wild = ("--preset", "clip", "--steps", 30, "--lr", 1e30, "--warmup", 0)
    told = clipcid("distill", *SHORT, *wild, "--name", "d", code=1).stderr
    folder = distill_place / "clipcid-work" / "distill" / "d"
    logged = [line["step"] for line in read_lines(folder / "train.jsonl")]
    step = logged[-1] + 1
    assert f"Training diverged at step {step}:" in told
    (saved,) = folder.glob("diverged_step_*.json")
    assert saved.name == f"diverged_step_{step:08d}.json"
    assert len(json.loads(saved.read_text())["keys"]) == 8
    assert not (folder / "student").exists()


def test_refuses_clusters_of_an_older_keep_list(clipcid: Clipcid, distill_place: Path) -> None:
    (metadata,) = (distill_place / "clipcid-work" / "embeddings").glob("*/metadata")
    keys = [key for path in sorted(metadata.glob("*.parquet")) for key in pq.read_table(path)["key"].to_pylist()]

    def write(kept: int) -> None:
        pq.write_table(pa.table({"key": keys, "kept": np.arange(len(keys)) < kept}), distill_place / "keep.parquet")

    write(20)
    clipcid("cluster", "--keep-list", "keep.parquet", "--num-clusters", 3, "--overwrite")
    write(18)
    run = clipcid("distill", *SHORT, "--keep-list", "keep.parquet", code=1)
    assert "Run cluster again with --keep-list keep.parquet --overwrite." in run.said
    assert "made by: clipcid cluster --keep-list keep.parquet --num-clusters 3 --overwrite" in run.said


def test_samples_without_clusters_are_left_out(clipcid: Clipcid, tiny_model: Path, tmp_path: Path) -> None:
    members = [*shard_members(0, 23), ("bad.png", b"no image"), ("bad.txt", b"a damaged one")]
    data = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    clipcid("embed", data, "--model", tiny_model, "--max-bad-fraction", 0.1)
    clipcid("cluster", "--num-clusters", 4, "--iterations", 2)
    command = ("distill", *SHORT, "--steps", 2, "--val-fraction", 0, "--online-teacher", "--max-bad-fraction")
    taught = clipcid(*command, 0.1)
    assert "1 of 24 samples to train on are not in clipcid-work/clusters: they are left out." in taught.said
    assert "23 samples, 2 steps" in taught.stderr
    refused = clipcid(*command, 0.01, "--name", "other", code=1)
    assert "or these could not be embedded (--max-bad-fraction)" in refused.said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--eval-data", "nowhere"), "--eval-data: There is no data at"),
        (("--keep-list", "nowhere.parquet"), "no keep list nowhere.parquet"),
        (("--preset", "cid"), "clipcid cluster"),
        (("--preset", "clip-kd", "--views", "stored"), "holds no views"),
    ],
    ids=str,
)
def test_what_is_missing_is_told_before_anything_is_embedded(
    flags: tuple[str, ...], message: str, clipcid: Clipcid, tiny_shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    call = ("distill", tiny_shards, "--teacher", tiny_model, "--student", "student.json")
    refused = clipcid(*call, *flags, code=1)
    assert message in refused.said
    assert not (tmp_path / "clipcid-work" / "embeddings").exists()


def test_the_average_is_exported(clipcid: Clipcid, distill_place: Path, tiny_model: Path, tiny_shards: Path) -> None:
    given = ("distill", *SHORT, "--preset", "clip", "--steps", 6, "--eval-every", 3, "--optimizer", "adamw")
    result = clipcid(*given, "--name", "a", "--ema", 0.9, "--eval-data", tiny_shards, "--json").json
    run = distill_place / "clipcid-work" / "distill" / "a"
    assert result["files"]["student_ema"] == "clipcid-work/distill/a/student-ema"
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    own = {name for name in lines[0] if not name.startswith("ema/")} - {"step"}
    for line in lines:
        assert line.keys() == own | {f"ema/{name}" for name in own} | {"step"}
    assert all(lines[0][f"ema/{name}"] == lines[0][name] for name in own)
    # What training measured is what the written folders score.
    assert [one["model"] for one in result["evaluations"]] == ["a-student", "a-student-ema"]
    for one, prefix in zip(result["evaluations"], ("", "ema/"), strict=True):
        for name, value in one["metrics"].items():
            assert lines[-1][f"{prefix}{tiny_shards.name}/{name}"] == pytest.approx(value, abs=1e-6)
    student, average = (load_file(run / name / WEIGHTS) for name in ("student", "student-ema"))
    assert student.keys() == average.keys()
    assert not np.array_equal(student["visual.proj"], average["visual.proj"])
    assert "Student and average (EMA)" in (run / "report.html").read_text()

    # Keeping it changes nothing of what is learned.
    clipcid(*given, "--name", "b")
    assert student_bytes(run.parent / "b") == student_bytes(run)
    assert "holds this run already, finished" in clipcid(*given, "--name", "b", "--dry-run").said

    (distill_place / "link").symlink_to(run / "student")
    exported = clipcid("export", "link", "--ema", "--json").json
    folder = distill_place / "clipcid-work" / "export" / "a-ema"
    assert exported["model"] == "clipcid-work/distill/a/student-ema"
    written = load_file(folder / WEIGHTS)
    assert all(np.array_equal(written[name], tensor) for name, tensor in average.items())
    card = (folder / "README.md").read_text()
    assert "an exponential moving average of those in training (decay 0.9)" in card
    measured = result["evaluations"][1]
    recall = measured["metrics"]["image_retrieval_recall@10"]
    assert f"| image_retrieval_recall\\@10 | {measured['images']} | {recall:.4f} |" in card  # no mention of anyone

    assert "is no student of clipcid distill" in clipcid("export", tiny_model, "--ema", check=False).said
    with (run / "student-ema" / WEIGHTS).open("ab") as file:
        file.write(b"\0")
    assert "has changed since" in clipcid("export", result["student"], "--ema", code=1).said
