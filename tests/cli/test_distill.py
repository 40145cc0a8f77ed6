"""`distill` from the command line: what it writes, that it resumes and shares out exactly, and how it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY_CONFIG, Run, run_command, shard_members, write_tar
from distill_data import SHORT, STUDENT, losses, student_bytes
from safetensors.numpy import load_file
from sidecars import unfinish

Clipcid = Callable[..., Run]


def test_writes_a_student_that_open_clip_loads_alone(clipcid: Clipcid, distill_place: Path) -> None:
    result = clipcid("distill", *SHORT, "--steps", 6, "--name", "a", "--json").json
    run = distill_place / "clipcid-work" / "distill" / "a"
    assert result["steps"] == 6
    assert result["samples"] == 48
    assert set(result["losses"]) == {"clip", "instance", "cluster"}
    assert 0 <= result["metrics"]["image_retrieval_recall@1"] <= 1
    assert {
        "student",
        "steps",
        "samples",
        "samples_per_second",
        "losses",
        "metrics",
        "evaluations",
        "seconds",
        "files",
    } == set(result)
    for name in result["files"].values():
        assert (distill_place / name).exists()
    assert [line["step"] for line in losses(run)] == [1, 2, 3, 4, 5, 6]
    for dry in ((), ("--dry-run",)):
        refused = clipcid("distill", *SHORT, "--steps", 7, "--name", "a", *dry, check=False)
        assert refused.returncode == 1
        assert "settings.steps: 6 there, 7 now" in refused.stderr
        assert "write elsewhere (--name)" in " ".join(refused.stderr.split())
    # Its model card says what the sidecars of the run say.
    card = Path(clipcid("export", "--json").json["files"]["README"])
    facts = [
        line.strip("| ").split(" | ")
        for line in (distill_place / card).read_text().splitlines()
        if line.startswith("| ")
    ]
    known = dict(fact for fact in facts if len(fact) == 2)
    assert known["Teacher"] == "tiny"
    assert known["Training data"].endswith(" of 24 samples used")
    assert known["Keep ratio"] == "1 (not balanced)"
    assert known["Losses"] == "clip × 1, instance × 1, cluster × 0.5"
    assert known["Training"] == "6 steps, 48 samples"
    assert known["Licence of the weights"] == "unknown"
    report = (run / "report.html").read_text()
    assert "Retrieval examples" in report
    assert "Student and teacher" in report
    assert "http" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    code = (
        "import sys, torch, open_clip\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.startswith('clipcid'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "model, _, preprocess = open_clip.create_model_and_transforms('local-dir:' + sys.argv[1])\n"
        "tokens = open_clip.get_tokenizer('local-dir:' + sys.argv[1])(['a red drawing'])\n"
        "print(model.encode_text(tokens).shape[1], preprocess.transforms[0].size)\n"
    )
    loaded = run_command(
        [sys.executable, "-W", "ignore", "-c", code, str(run / "student")], distill_place, True, 120, None
    )
    assert loaded.stdout.split()[0] == str(STUDENT["embed_dim"])
    again = clipcid("distill", *SHORT, "--steps", 6, "--name", "a")
    assert "finished" in again.stderr
    # Killed after its last checkpoint and before its sidecar, a run only has its results written again.
    weights = student_bytes(run)
    unfinish(run, "distill")
    finished = clipcid("distill", *SHORT, "--steps", 6, "--name", "a", "--json").json
    assert {name: finished[name] for name in ("losses", "metrics")} == {
        name: result[name] for name in ("losses", "metrics")
    }
    assert student_bytes(run) == weights
    other = clipcid("distill", *SHORT, "--steps", 7, "--name", "a", check=False)
    assert other.returncode == 1
    assert "steps" in other.stderr
    assert "--overwrite" in other.stderr


def test_needs_no_teacher_for_preset_clip(binary: Clipcid, tmp_path: Path, tiny_shards: Path) -> None:
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    arguments = (
        "distill",
        tiny_shards,
        *SHORT,
        "--teacher",
        "none",
        "--preset",
        "clip",
        "--steps",
        3,
        "--wd",
        0.5,
        "--lr",
        0.1,
        "--warmup",
        0,
    )
    result = binary(*arguments, "--json").json
    assert set(result["losses"]) == {"clip"}
    assert not (tmp_path / "clipcid-work" / "embeddings").exists()
    # Tokens that no caption uses are decayed as AdamW decays a row without gradient, by Π(1 − lr·wd).
    import torch

    from clipcid_cli.runtime.models.clip_model import load_model
    from clipcid_cli.runtime.models.names import parse_model

    first = load_model(parse_model(str(tmp_path / "student.json")), fresh_seed=0).module.state_dict()
    trained = load_file(tmp_path / result["student"] / "open_clip_model.safetensors")
    name = "token_embedding.weight"
    rates = [0.05 * (1 + np.cos(np.pi * step / 3)) for step in range(3)]
    unused = 40_000
    expected = first[name][unused] * float(np.prod([1 - 0.5 * rate for rate in rates]))
    torch.testing.assert_close(torch.from_numpy(trained[name][unused]), expected)
    assert trained[name].shape == (TINY_CONFIG["text_cfg"]["vocab_size"], 16)


def test_divergence_stops_with_the_keys_of_the_batch(clipcid: Clipcid, distill_place: Path) -> None:
    # The preset that needs no teacher takes its data from where the embeddings were made of.
    run = clipcid(
        "distill", *SHORT, "--preset", "clip", "--steps", 30, "--lr", 1e30, "--warmup", 0, "--name", "d", check=False
    )
    assert run.returncode == 1
    assert "diverged" in run.stderr
    (saved,) = (distill_place / "clipcid-work" / "distill" / "d").glob("diverged_step_*.json")
    keys = json.loads(saved.read_text())["keys"]
    assert len(keys) == 8
    assert not (distill_place / "clipcid-work" / "distill" / "d" / "student").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, ["--student"]),
        (("--student", "student.json", "--loss", "clp=1"), 2, ["clp", "instance"]),
        (("--student", "student.json", "--loss", "clip=-1"), 2, ["clip=-1"]),
        (("--student", "student.json", "--steps", 5, "--epochs", 2), 2, ["--steps", "--epochs"]),
        (("--student", "student.json", "--teacher", "none", "--preset", "cid"), 2, ["instance", "--preset clip"]),
        (("--student", "nowhere.json", "--preset", "clip"), 1, ["nowhere.json"]),
        (
            ("--student", "student.json", "--clusters", "nowhere"),
            2,
            ["--clusters: for the cluster loss", "--preset cid"],
        ),
        (
            ("--student", "student.json", "--preset", "cid", "--clusters", "nowhere"),
            1,
            ["nowhere", "another folder with --clusters"],
        ),
        (("--student", "student.json", "--keep-list", "nowhere.parquet"), 1, ["nowhere.parquet", "clipcid balance"]),
        (("--student", "student.json", "--batch-size", 500), 1, ["500", "--batch-size"]),
        (("--student", "student.json", "--resume", "latest", "--batch-size", 8), 1, ["no checkpoint"]),
        (("--student", "student.json", "--resume", "latest", "--overwrite"), 2, ["--overwrite discards"]),
        (("--student", "student.json", "--name", ".."), 2, ["--name '..' is not"]),
        (("--student", "student.json", "--name", "lr/1e-3"), 2, ["--name 'lr/1e-3' is not the name of one folder"]),
        (("--student", "student.json", "--freeze-image", "--freeze-text"), 2, ["nothing to train"]),
        (("--student", "student.json", "--batch-size", 8, "--accum-freq", 3), 2, ["8", "3", "multiple"]),
        (("--student", "student.json", "--init-from", "nowhere/"), 1, ["nowhere"]),
        (("--student", "student.json", "--teacher", "ViT-L-99", "--embeddings", "no/rows"), 1, ["Model ViT-L-99"]),
    ],
)
def test_refuses(
    arguments: tuple[object, ...], code: int, words: list[str], clipcid: Clipcid, distill_place: Path
) -> None:
    run = clipcid("distill", *arguments, check=False)
    assert run.returncode == code, run
    assert "Traceback" not in run.stderr, run
    for word in words:
        assert word in run.stderr, run
    assert not list(distill_place.glob("clipcid-work/distill/*/student"))


def test_refuses_embeddings_of_another_teacher(
    clipcid: Clipcid, distill_place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from conftest import write_tiny_model

    other = write_tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)
    (embeddings,) = (distill_place / "clipcid-work" / "embeddings").iterdir()
    run = clipcid("distill", *SHORT, "--teacher", other, "--embeddings", embeddings, check=False)
    assert run.returncode == 1
    assert re.search(rf"clipcid embed \S+ \\? *--model {other}", run.stderr.replace("\n", " "))


def test_refuses_clusters_of_an_older_keep_list(clipcid: Clipcid, distill_place: Path) -> None:
    (metadata,) = [
        sorted(path.glob("*.parquet")) for path in (distill_place / "clipcid-work" / "embeddings").glob("*/metadata")
    ]
    keys = [key for path in metadata for key in pq.read_table(path)["key"].to_pylist()]

    def write(kept: int) -> None:
        pq.write_table(pa.table({"key": keys, "kept": np.arange(len(keys)) < kept}), distill_place / "keep.parquet")

    write(20)
    clipcid("cluster", "--keep-list", "keep.parquet", "--num-clusters", 3, "--overwrite")
    write(18)
    run = clipcid("distill", *SHORT, "--keep-list", "keep.parquet", check=False)
    assert run.returncode == 1
    command = " ".join(run.stderr.rpartition("Run: ")[2].replace("\\\n", " ").split())
    expected = "clipcid cluster --num-clusters 3 --embeddings clipcid-work/embeddings/"
    assert command.startswith(expected), run
    assert command.endswith(" --keep-list keep.parquet --overwrite"), run


def test_data_without_captions_is_refused(clipcid: Clipcid, tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(json.dumps(STUDENT))
    write_tar(tmp_path / "data" / "0.tar", shard_members(0, 9, captions=False))
    run = clipcid("distill", "data", *SHORT, "--preset", "clip", "--teacher", "none", check=False)
    assert run.returncode == 1
    assert "caption" in run.stderr
