"""What real gloo processes share: features and gradients, which together are those of one, and the first's statistics."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import process_context

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace
from clipcid_cli.runtime.distributed import DistContext
from clipcid_cli.steps.distill.evaluation import share_statistics
from clipcid_cli.steps.distill.objective import Objective
from clipcid_cli.training.gradients import Features, GradientAverager, gather_rows

BATCH, EXTRA, WIDTH, TEACHER_WIDTH = 12, 6, 6, 9
SPACE = SharedSpace(TEACHER_WIDTH, is_learned=True)
WITHOUT_CLUSTERS: Any = SimpleNamespace(image_clusters=None, text_clusters=None)
# `gd` is a thousand times as large as the others.
WEIGHTS = {name: 1e-3 if name == "gd" else 1.0 for name, entry in LOSSES.items() if not entry.needs_clusters}


def make_objective(context: DistContext, extra: torch.Tensor | None = None, *, local: bool = False) -> Objective:
    """Make all losses, of a teacher whose rows are drawn here; each process takes its own.

    Args:
        extra: The teacher's rows of this process's further texts.
    """
    rows = torch.randn(2, BATCH, TEACHER_WIDTH, generator=torch.Generator().manual_seed(7))
    rows = torch.nn.functional.normalize(rows, dim=2).tensor_split(context.size, dim=1)[context.rank]
    teacher: Any = SimpleNamespace(space=SPACE, scale=30.0, rows=lambda _: (*rows, extra))
    return Objective(WEIGHTS, LossParameters(WEIGHTS, WIDTH, SPACE, 1), teacher, context, local)


def one_step(rank: int, size: int, local: bool = False) -> tuple[float, list[np.ndarray]]:
    """Run a small model of two linear towers over this process's part of the batch; return loss and all gradients."""
    torch.manual_seed(0)
    towers = torch.nn.ModuleList([torch.nn.Linear(5, WIDTH), torch.nn.Linear(4, WIDTH)])
    scale = torch.nn.Parameter(torch.tensor(2.0))
    images, texts = torch.randn(BATCH, 5), torch.randn(BATCH, 4)
    extra = torch.randn(EXTRA, 4)
    taught = torch.nn.functional.normalize(torch.randn(EXTRA, TEACHER_WIDTH), dim=1)
    own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    own_extra = slice(rank * EXTRA // size, (rank + 1) * EXTRA // size)
    context = DistContext(rank, size, rank, torch.device("cpu"))
    objective = make_objective(context, taught[own_extra], local=local)
    of_losses = [scale, *objective.parameters.parameters()]
    trained = [*towers.parameters(), *of_losses]
    averager = GradientAverager([*(list(tower.parameters()) for tower in reversed(towers)), of_losses])
    image, text = (tower(rows[own]) for tower, rows in zip(towers, (images, texts), strict=True))
    image_tokens = torch.stack([towers[0](images[own] * factor) for factor in (1, -1, 0.3)], dim=1)
    exists = torch.arange(BATCH)[own, None] % 3 >= torch.arange(3)  # some captions have one token, some three
    text_tokens = torch.stack([towers[1](texts[own] * factor) for factor in (1, -1, 0.3)], dim=1) * exists[:, :, None]
    text = torch.cat([text, towers[1](extra[own_extra])])
    text_tokens = torch.cat([text_tokens, text_tokens[: EXTRA // size]])  # of texts without images no loss reads any
    features = Features(image, text, towers[0](images[own].relu()), image_tokens, text_tokens)
    total, values = objective(features, scale.exp(), WITHOUT_CLUSTERS)
    averager.watch()
    total.backward()  # type: ignore[no-untyped-call]
    averager.finish()
    gradients = [parameter.grad.numpy().copy() for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained)
    return float(values.sum()), gradients


def gather_statistics(rank: int, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Normalise this process's rows in training; return the running statistics before and after they are shared."""
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(5))
    norm(torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(rank)))
    own = [buffer.numpy().copy() for buffer in norm.buffers()]
    share_statistics(norm, DistContext(rank, size, rank, torch.device("cpu")))
    return own, [buffer.numpy() for buffer in norm.buffers()]


def process(rank: int, size: int, local: bool, store: str, results: multiprocessing.Queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        results.put((rank, (*one_step(rank, size, local), *gather_statistics(rank, size))))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("size", "local"), [(2, False), (2, True), (3, True)])
def test_processes_together_equal_one(size: int, local: bool, tmp_path: Path) -> None:
    context = process_context()
    results = context.Queue()
    workers = [
        context.Process(target=process, args=(rank, size, local, str(tmp_path / "store"), results))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    loss, gradients = one_step(0, 1)
    for rank in range(size):
        assert found[rank][0] == pytest.approx(loss, rel=1e-6, abs=1e-5)
        for mine, single in zip(found[rank][1], gradients, strict=True):
            np.testing.assert_allclose(mine, single, atol=1e-5, rtol=1e-4)
        # The processes must not drift apart by a bit, or they would train different students.
        for mine, first in zip(found[rank][1], found[0][1], strict=True):
            np.testing.assert_array_equal(mine, first)
        own, shared = found[rank][2:]
        assert not np.array_equal(own[0], found[0][2][0]) or rank == 0
        for mine, first in zip(shared, found[0][2], strict=True):
            np.testing.assert_array_equal(mine, first)


def test_one_process_gathers_nothing() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows


def test_masked_images_reach_no_other_loss() -> None:
    """Neither the value nor the gradients of the other losses depend on them."""

    def losses(masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        objective = make_objective(DistContext(0, 1, 0, torch.device("cpu")))
        objective = dataclasses.replace(objective, weights=WEIGHTS | {"mfd": 0.0})
        image, text = torch.randn(2, BATCH, WIDTH, generator=torch.Generator().manual_seed(2))
        features = Features(image, text, masked.requires_grad_(), image[:, None], text[:, None])
        others, found = objective(features, torch.tensor(5.0), WITHOUT_CLUSTERS)
        return found, torch.autograd.grad(others, masked)[0]

    (some, gradient), (other, _) = losses(torch.ones(BATCH, WIDTH)), losses(torch.eye(BATCH, WIDTH))
    assert gradient.abs().sum() == 0
    assert [name for name, one, two in zip(WEIGHTS, some, other, strict=True) if one != two] == ["mfd"]
