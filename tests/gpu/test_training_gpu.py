"""Compiled towers, and several processes, each with a GPU of its own: what one process has, by NCCL or gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from balance_data import make_rows, write_embeddings
from conftest import Clipcid, clean_environment, torchrun_command
from distill_data import SHORT, losses

pytestmark = pytest.mark.gpu
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
TRAIN = ("distill", *SHORT, "--precision", "fp32", "--device", "cuda")


@two_devices
def test_balance_and_cluster(clipcid: Clipcid, torchrun: Clipcid, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "embeddings", make_rows(9000, 48))
    for command in (("balance", "--keep", 0.6), ("cluster", "--num-clusters", 40)):
        options = (*command, "--embeddings", "embeddings", "--device", "cuda", "--work")
        clipcid(*options, "one")
        torchrun(2, *options, "two")
    for file in (
        "balance/keep.parquet",
        "balance/forest.parquet",
        "clusters/centroids.npy",
        "clusters/clusters.parquet",
    ):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=two_devices)])
def test_other_ways_to_train_have_the_same_losses(processes: int, torchrun: Clipcid, distill_place: Path) -> None:
    torchrun(1, *TRAIN, "--steps", 4, "--name", "plain")
    torchrun(processes, *TRAIN, "--steps", 4, "--name", "other", *(["--torchcompile"] if processes == 1 else []))
    runs = distill_place / "clipcid-work" / "distill"
    for plain, other in zip(losses(runs / "plain"), losses(runs / "other"), strict=True):
        assert other["loss"] == pytest.approx(plain["loss"], rel=1e-3)


@two_devices
def test_a_killed_process_ends_the_others_within_half_a_minute(distill_place: Path) -> None:
    options = ("--steps", 100_000, "--checkpoint-every", 2, "--name", "killed")
    command = [*torchrun_command(2), *map(str, (*TRAIN, *options))]
    checkpoints = distill_place / "clipcid-work" / "distill" / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    with subprocess.Popen(command, cwd=distill_place, env=clean_environment()) as process:
        while not list(checkpoints.glob("*.pt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(find_rank(process.pid, 1), signal.SIGKILL)
        assert process.wait(30) != 0


def find_rank(launcher: int, rank: int) -> int:
    """Return the number of a launcher's process that has a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (found,) = (
        int(child)
        for child in children
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    )
    return found
