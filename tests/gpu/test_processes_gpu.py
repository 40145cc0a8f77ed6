"""Several processes, each with a GPU of its own: the bytes of one process, whatever travels through NCCL or gloo."""

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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


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


def test_distill(clipcid: Clipcid, torchrun: Clipcid, distill_place: Path) -> None:
    options = ("distill", *SHORT, "--steps", 4, "--precision", "fp32", "--device", "cuda", "--name")
    clipcid(*options, "one")
    torchrun(2, *options, "two")
    runs = distill_place / "clipcid-work" / "distill"
    for one, two in zip(losses(runs / "one"), losses(runs / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_a_killed_process_ends_the_others_within_half_a_minute(distill_place: Path) -> None:
    options = (*SHORT, "--steps", 100_000, "--checkpoint-every", 2, "--device", "cuda", "--name", "killed")
    command = [*torchrun_command(2), "distill", *map(str, options)]
    checkpoints, deadline = (
        distill_place / "clipcid-work" / "distill" / "killed" / "checkpoints",
        time.monotonic() + 120,
    )
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
