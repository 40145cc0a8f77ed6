"""Several processes, each with a GPU of its own: the bytes of one process, whatever travels through NCCL or gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from balance_data import make_rows, write_embeddings
from conftest import Run
from distill_data import SHORT, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_balance_and_cluster(clipcid: Callable[..., Run], torchrun: Callable[..., Run], tmp_path: Path) -> None:
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


def test_distill(clipcid: Callable[..., Run], torchrun: Callable[..., Run], distill_place: Path) -> None:
    options = ("distill", *SHORT, "--steps", 4, "--precision", "fp32", "--device", "cuda", "--name")
    clipcid(*options, "one")
    torchrun(2, *options, "two")
    runs = distill_place / "clipcid-work" / "distill"
    for one, two in zip(losses(runs / "one"), losses(runs / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
