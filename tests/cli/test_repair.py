"""The repair of a teacher from the command line: what is decided, where it is kept, and that nothing else moves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from balance_data import unit, write_embeddings
from conftest import Clipcid, Run, make_image, run_clipcid, write_tar
from distill_data import STUDENT, losses, student_bytes

NUM_PAIRS, NUM_CAPTIONS, WIDTH = 400, 100, 64
DISTILL = ("distill", "pairs.tar", "--embeddings", "teacher", "--student", "student.json", "--batch-size", 32)
DISTILL += ("--steps", 3, "--val-fraction", 0.1)
CLUSTER = ("cluster", "--embeddings", "teacher", "--num-clusters", 16, "--iterations", 3)
REPAIRED = "repaired (--repair none leaves it as it is)"


def write_teacher(folder: Path, *, turned: bool) -> None:
    """Write the rows of a teacher, of pairs whose captions repeat: a sound one, or one whose images were all rotated."""
    random = np.random.default_rng(0)
    number = np.arange(NUM_PAIRS) % NUM_CAPTIONS
    captions = unit(random.normal(size=(NUM_CAPTIONS, WIDTH)))
    images = unit(captions[number] + 0.05 * random.normal(size=(NUM_PAIRS, WIDTH)))
    if turned:
        images = images @ np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0]
    texts = captions[number].astype(np.float16)
    told = [f"number {caption}" for caption in number]
    keys = [f"{row:05d}" for row in range(NUM_PAIRS)]
    write_embeddings(folder, images.astype(np.float16), 1, keys=keys, texts=texts, captions=told)


def make_place(folder: Path, *, turned: bool) -> Path:
    """Write the pairs, a teacher's rows of them, and a student."""
    members = []
    for row in range(NUM_PAIRS):
        caption = f"number {row % NUM_CAPTIONS}"
        members += [(f"{row:05d}.png", make_image(row, side=24)), (f"{row:05d}.txt", caption.encode())]
    write_tar(folder / "pairs.tar", members)
    write_teacher(folder / "teacher", turned=turned)
    (folder / "student.json").write_text(json.dumps(STUDENT))
    return folder


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The clustering of a teacher that needs repair; runs are added to its folder, and nothing is changed."""
    return run_clipcid(*CLUSTER, "--json", cwd=make_place(tmp_path_factory.mktemp("turned"), turned=True))


def repair_of(work: Path) -> Path:
    """Return the folder of the only repair of a work directory."""
    [found] = (work / "repair").iterdir()
    return found


def test_cluster_and_distill_take_one_repair(clustered: Run) -> None:
    work = clustered.cwd / "clipcid-work"
    repair = repair_of(work)
    sidecar = json.loads((repair / "repair.json").read_text())
    figures = sidecar["result"]
    assert clustered.json["repair"] == figures
    assert clustered.json["seconds"]["repair"] >= sidecar["seconds"]["fit"]
    assert json.loads((work / "clusters" / "cluster.json").read_text())["space"] == "repaired"
    assert figures["recall_at_1"][0] < 0.2 < 0.3 < figures["recall_at_1"][1]
    before, after = np.exp(figures["log_rank"])
    assert f"image {before:.2f} → {after:.2f} (geometric mean): {REPAIRED}" in clustered.said
    with np.load(repair / "repair.npz") as arrays:
        assert arrays["image_map"].shape == (WIDTH, WIDTH)
        assert arrays["image_map"].dtype == np.float32
    before = (repair / "repair.npz").stat().st_mtime_ns

    taught = run_clipcid(*DISTILL, "--preset", "cid", "--name", "cid", "--json", cwd=clustered.cwd)
    assert taught.json["repair"] == figures
    assert (repair / "repair.npz").stat().st_mtime_ns == before
    run = work / "distill" / "cid"
    hashes = {each["hash"] for each in json.loads((run / "distill.json").read_text())["inputs"]}
    assert sidecar["outputs"][0]["hash"] in hashes
    assert "repaired" in (run / "report.html").read_text()

    without = ("--preset", "cid", "--name", "other", "--repair", "none")
    refused = run_clipcid(*DISTILL, *without, cwd=clustered.cwd, code=1)
    assert "are of a repaired teacher, and this run has its teacher as it is" in refused.said
    assert "clipcid cluster" in refused.said
    assert "--repair none" in refused.said


def test_the_repaired_rows_teach(clustered: Run) -> None:
    told = {
        name: run_clipcid(*DISTILL, *flags, cwd=clustered.cwd).said
        for name, flags in (("repaired", ("--name", "repaired")), ("raw", ("--repair", "none")))
    }
    work = clustered.cwd / "clipcid-work"
    assert "Loss: 1·clip + 31.25·fd + " in told["repaired"]
    (raw,) = (work / "distill").glob("*-clip-instance-s0*")  # not clip-kd: it has no part in the run
    assert losses(work / "distill" / "repaired") != losses(raw)
    # What a run says of the teacher is of the rows that teach.
    assert "Teacher on these captions, after its repair: median rank" in told["repaired"]
    assert "Loss: 1·clip + 1·instance (the teacher is near chance)." in told["raw"]
    following = "so its features are not followed: the losses are clip and instance. Try --teacher none."
    assert f"near chance, {following}" in told["raw"]
    report, sidecar = ((raw / name).read_text() for name in ("report.html", "distill.json"))
    assert "near chance; try --teacher none" in report
    assert json.loads(sidecar)["result"]["pairing"]["near_chance"]
    assert json.loads(sidecar)["settings"]["preset"] == "clip-instance"
    typed = run_clipcid(
        *DISTILL, "--loss", "fd=3", "--repair", "none", "--name", "fd", "--dry-run", "--json", cwd=clustered.cwd
    )
    assert "near chance, but followed, as --loss fd=3 says. Try --teacher none without --loss fd=3." in typed.said
    assert "Loss: 1·clip + 1·instance + 3·fd (the teacher is near chance)." in typed.said
    pairing = typed.json["pairing"]
    assert (pairing["pairs"], pairing["candidates"], pairing["repaired"]) == (397, 394, False)
    assert pairing["recall_at_10"] < 5 * pairing["chance_at_10"]


def test_two_processes_make_the_same_repair_and_no_dry_run_does(clustered: Run, torchrun: Clipcid) -> None:
    place = clustered.cwd
    assert "a run decides whether it is repaired" in run_clipcid(*CLUSTER, "--work", "two", "--dry-run", cwd=place).said
    assert not (place / "two").exists()
    assert REPAIRED in run_clipcid(*CLUSTER, "--dry-run", cwd=place).said
    torchrun(2, *CLUSTER, "--work", "two", cwd=place)
    repair = repair_of(place / "two") / "repair.npz"
    expected = (repair_of(place / "clipcid-work") / "repair.npz").read_bytes()
    assert repair.read_bytes() == expected
    for file in ("centroids.npy", "clusters.parquet"):
        one, two = (place / work / "clusters" / file for work in ("clipcid-work", "two"))
        assert one.read_bytes() == two.read_bytes()

    stat = repair.stat()
    damaged = bytearray(repair.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    repair.write_bytes(damaged)
    os.utime(repair, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a disk that fails does not tell
    call = (*DISTILL, "--preset", "cid", "--work", "two")
    refused = run_clipcid(*call, cwd=place, code=1).said
    assert "repair.npz is damaged: it is not the file that repair.json says was written." in refused
    assert f"Remove {repair.parent.relative_to(place)}: the next run decides again." in refused
    # A dry run that leaves the repair open takes clusters of repaired rows; a run makes the same again.
    shutil.rmtree(place / "two" / "repair")
    assert "a run decides whether it is repaired" in run_clipcid(*call, "--dry-run", cwd=place).said
    run_clipcid(*call, cwd=place)
    assert repair.read_bytes() == expected


def test_a_sound_teacher_stays_to_the_bit(clipcid: Clipcid, tmp_path: Path) -> None:
    make_place(tmp_path, turned=False)
    work = tmp_path / "clipcid-work"
    chosen = clipcid(*DISTILL, "--name", "auto", "--json")
    clipcid(*DISTILL, "--name", "none", "--repair", "none")
    assert "Teacher left as it is" in chosen.said
    assert "(a guess: 5.0%)" in chosen.said, "a fold has a fifth of the captions"
    assert "Teacher on these captions: median rank 1 of 394 (chance 198), R@1 100.0% (chance 0.25%)" in chosen.said
    assert not chosen.json["pairing"]["near_chance"]
    assert "repair" not in chosen.json
    assert student_bytes(work / "distill" / "auto") == student_bytes(work / "distill" / "none")
    assert [path.name for path in repair_of(work).glob("[!.]*")] == ["repair.json"]
    # The same run, however it was asked for: nothing is refused, nothing trained again.
    assert "finished" in clipcid(*DISTILL, "--name", "auto", "--repair", "none").said
    # What was decided for other rows is decided again.
    shutil.rmtree(tmp_path / "teacher")
    write_teacher(tmp_path / "teacher", turned=True)
    anew = clipcid(*CLUSTER)
    assert "was decided for other rows, or has been changed: deciding again." in anew.said
    assert REPAIRED in anew.said
    assert (repair_of(work) / "repair.npz").exists()
    shutil.rmtree(tmp_path / "teacher")
    write_teacher(tmp_path / "teacher", turned=False)
    assert "Teacher left as it is" in clipcid(*CLUSTER, "--overwrite").said
    assert not (repair_of(work) / "repair.npz").exists()
