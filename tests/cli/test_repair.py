"""The repair of a teacher from the command line: what is decided, where it is kept, and that nothing else moves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Clipcid, make_image, write_tar
from distill_data import STUDENT, losses, student_bytes

NUM_PAIRS, NUM_CAPTIONS, WIDTH = 400, 100, 64
DISTILL = ("distill", "pairs.tar", "--embeddings", "teacher", "--student", "student.json", "--batch-size", 32)
DISTILL += ("--steps", 3, "--workers", 0, "--val-fraction", 0.1)
CLUSTER = ("cluster", "--embeddings", "teacher", "--num-clusters", 16, "--iterations", 3)


def unit(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_place(folder: Path, *, turned: bool) -> Path:
    """Write pairs, whose captions repeat, and the rows of a teacher: a sound one, or one whose images were all rotated."""
    random = np.random.default_rng(0)
    number = np.arange(NUM_PAIRS) % NUM_CAPTIONS
    captions = unit(random.normal(size=(NUM_CAPTIONS, WIDTH)))
    images = unit(captions[number] + 0.05 * random.normal(size=(NUM_PAIRS, WIDTH)))
    if turned:
        images = images @ np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    keys = [f"{row:05d}" for row in range(NUM_PAIRS)]
    for kind, rows in (("img_emb", images), ("text_emb", captions[number])):
        (folder / "teacher" / kind).mkdir(parents=True)
        np.save(folder / "teacher" / kind / f"{kind}_0000.npy", rows.astype(np.float16))
    (folder / "teacher" / "metadata").mkdir()
    table = pa.table({"key": keys, "caption": [f"number {caption}" for caption in number]})
    pq.write_table(table, folder / "teacher" / "metadata" / "metadata_0000.parquet")
    members = []
    for row, (key, caption) in enumerate(zip(keys, number, strict=True)):
        members += [(f"{key}.png", make_image(row, side=24)), (f"{key}.txt", f"number {caption}".encode())]
    write_tar(folder / "pairs.tar", members)
    (folder / "student.json").write_text(json.dumps(STUDENT))
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"turned": True, "sound": False}
    return {name: make_place(tmp_path_factory.mktemp(name), turned=turned) for name, turned in made.items()}


@pytest.fixture
def turned(places: dict[str, Path], tmp_path: Path) -> Path:
    for path in places["turned"].iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def repair_of(work: Path) -> Path:
    """Return the folder of the only repair of a work directory."""
    [found] = (work / "repair").iterdir()
    return found


def test_cluster_and_distill_take_one_repair(clipcid: Clipcid, turned: Path) -> None:
    clustered = clipcid(*CLUSTER, "--json")
    repair = repair_of(turned / "clipcid-work")
    sidecar = json.loads((repair / "repair.json").read_text())
    figures = sidecar["result"]
    assert clustered.json["repair"] == figures
    assert figures["recall_at_1"][0] < 0.2 < 0.3 < figures["recall_at_1"][1]
    assert "repaired (--repair none leaves it as it is)" in clustered.said
    with np.load(repair / "repair.npz") as arrays:
        assert arrays["image_map"].shape == (WIDTH, WIDTH)
        assert arrays["image_map"].dtype == np.float32
    before = (repair / "repair.npz").stat().st_mtime_ns

    taught = clipcid(*DISTILL, "--preset", "cid", "--name", "cid", "--json")
    assert taught.json["repair"] == figures
    assert (repair / "repair.npz").stat().st_mtime_ns == before
    run = turned / "clipcid-work" / "distill" / "cid"
    hashes = {each["hash"] for each in json.loads((run / "distill.json").read_text())["inputs"]}
    assert sidecar["outputs"][0]["hash"] in hashes
    assert "repaired" in (run / "report.html").read_text()

    refused = clipcid(*DISTILL, "--preset", "cid", "--name", "other", "--repair", "none", code=1)
    assert "are of a repaired teacher, and this run has its teacher as it is" in refused.said
    assert "clipcid cluster" in refused.said
    assert "--repair none" in refused.said

    path = repair / "repair.npz"
    stat = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a disk that fails does not tell
    refused = clipcid(*DISTILL, code=1)
    assert "repair.npz is damaged: it is not the file that repair.json says was written." in refused.said
    assert f"Remove {repair.relative_to(turned)}: the next run repairs anew." in refused.said


def test_the_repaired_rows_teach(clipcid: Clipcid, turned: Path) -> None:
    told = {
        name: clipcid(*DISTILL, "--name", name, *flags).said
        for name, flags in (("repaired", ()), ("raw", ("--repair", "none")))
    }
    repair = repair_of(turned / "clipcid-work")
    before, after = json.loads((repair / "repair.json").read_text())["result"]["log_rank"]
    assert f"(trust in the teacher {np.exp(after - before):.2f}, by its repair)" in told["repaired"]
    assert "trust" not in told["raw"]
    runs = turned / "clipcid-work" / "distill"
    assert losses(runs / "repaired") != losses(runs / "raw")
    # A repair that was removed is made again to the same bytes: the run is the one that is there.
    shutil.rmtree(turned / "clipcid-work" / "repair")
    assert "finished" in clipcid(*DISTILL, "--name", "repaired").said


def test_a_sound_teacher_stays_to_the_bit(clipcid: Clipcid, turned: Path, places: dict[str, Path]) -> None:
    work = turned / "clipcid-work"
    (turned / "teacher").unlink()
    (turned / "teacher").symlink_to(places["sound"] / "teacher")
    chosen = clipcid(*DISTILL, "--name", "auto", "--json")
    clipcid(*DISTILL, "--name", "none", "--repair", "none")
    assert "Teacher left as it is" in chosen.said
    assert "(a guess: 5.0%)" in chosen.said, "a fold has a fifth of the captions"
    assert "repair" not in chosen.json
    assert student_bytes(work / "distill" / "auto") == student_bytes(work / "distill" / "none")
    assert [path.name for path in repair_of(work).glob("[!.]*")] == ["repair.json"]
    # The same run, however it was asked for: nothing is refused, nothing trained again.
    assert "finished" in clipcid(*DISTILL, "--name", "auto", "--repair", "none").said


def test_a_dry_run_decides_nothing_and_two_agree(clipcid: Clipcid, torchrun: Clipcid, turned: Path) -> None:
    assert "a run decides whether it is repaired" in clipcid(*CLUSTER, "--work", "one", "--dry-run").said
    assert not (turned / "one").exists()
    clipcid(*CLUSTER, "--work", "one")
    assert "repaired (--repair none leaves it as it is)" in clipcid(*CLUSTER, "--work", "one", "--dry-run").said
    torchrun(2, *CLUSTER, "--work", "two")
    repair = repair_of(turned / "one").relative_to(turned / "one") / "repair.npz"
    for file in (repair, "clusters/centroids.npy", "clusters/clusters.parquet"):
        assert (turned / "one" / file).read_bytes() == (turned / "two" / file).read_bytes()
    # One that leaves the repair open takes clusters of repaired rows.
    shutil.rmtree(turned / "one" / "repair")
    dry = clipcid(*DISTILL, "--preset", "cid", "--work", "one", "--dry-run")
    assert "a run decides whether it is repaired" in dry.said


def test_a_repair_of_other_rows_is_made_again(clipcid: Clipcid, turned: Path, places: dict[str, Path]) -> None:
    (turned / "teacher").unlink()
    shutil.copytree(places["turned"] / "teacher", turned / "teacher")
    clipcid(*CLUSTER)
    shutil.copytree(places["sound"] / "teacher", turned / "teacher", dirs_exist_ok=True)
    again = clipcid(*CLUSTER, "--overwrite")
    assert "was decided for other rows, or has been changed: repairing anew." in again.said
    assert "Teacher left as it is" in again.said
    assert not (repair_of(turned / "clipcid-work") / "repair.npz").exists()
