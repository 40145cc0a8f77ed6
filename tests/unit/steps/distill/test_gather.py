"""What real gloo processes share: features and gradients, which together are those of one, and the first's statistics."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import process_context

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.algorithms.losses.shared_space import SharedSpace
from clipcid_cli.runtime.machine import Machine
from clipcid_cli.runtime.models.grad_cache import Features
from clipcid_cli.runtime.training.gradients import GradientAverager, gather_rows
from clipcid_cli.runtime.training.trainer import LossParameters
from clipcid_cli.steps.distill.batches import TrainingBatch
from clipcid_cli.steps.distill.evaluation import share_statistics
from clipcid_cli.steps.distill.objective import Objective, Targets, Teacher

BATCH, EXTRA, WIDTH, TEACHER_WIDTH = 12, 6, 6, 9
# `gd` is a thousand times as large as the others.
WEIGHTS = {name: 1e-3 if name == "gd" else 1.0 for name, entry in LOSSES.items() if not entry.needs_clusters}
OWN_SCALES = [name for name in WEIGHTS if LOSSES[name].own_scale]


class FixedTeacher(Teacher):
    """A teacher whose rows are given."""

    def teacher_rows(self, local: TrainingBatch, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(7)
        rows = torch.nn.functional.normalize(torch.randn(2, BATCH, TEACHER_WIDTH, generator=random), dim=2)
        image, text = rows[:, gather_rows(local.rows, self.size)]
        return image, text


def make_batch(rows: torch.Tensor) -> TrainingBatch:
    nothing = torch.zeros(len(rows))
    return TrainingBatch(nothing, nothing, nothing, rows, nothing, nothing, nothing, rows[:0], [])


def one_step(rank: int, size: int, local: bool = False) -> tuple[float, list[np.ndarray]]:
    """Run a small model of two linear towers over this process's share of the batch; return loss and all gradients."""
    torch.manual_seed(0)
    towers = torch.nn.ModuleList([torch.nn.Linear(5, WIDTH), torch.nn.Linear(4, WIDTH)])
    scale = torch.nn.Parameter(torch.tensor(2.0))
    images, texts = torch.randn(BATCH, 5), torch.randn(BATCH, 4)
    parameters = LossParameters(
        [n for n in WEIGHTS if LOSSES[n].own_scale], WIDTH, TEACHER_WIDTH, 1, fused_width=TEACHER_WIDTH
    )
    of_losses = [scale, *parameters.parameters()]
    trained = [*towers.parameters(), *of_losses]
    averager = GradientAverager([list(tower.parameters()) for tower in reversed(towers)], of_losses, size)
    machine = Machine(rank, size, rank, torch.device("cpu"))
    teacher = FixedTeacher(SharedSpace(TEACHER_WIDTH, is_learned=True), 30.0, None, torch.device("cpu"), size)
    objective = Objective(WEIGHTS, parameters, teacher, machine, local=local)
    share = BATCH // size
    mine = slice(rank * share, (rank + 1) * share)
    image, text = (tower(rows[mine]) for tower, rows in zip(towers, (images, texts), strict=True))
    image_tokens = torch.stack([towers[0](images[mine] * factor) for factor in (1, -1, 0.3)], dim=1)
    exists = torch.arange(BATCH)[mine, None] % 3 >= torch.arange(3)  # some captions have one token, some three
    text_tokens = torch.stack([towers[1](texts[mine] * factor) for factor in (1, -1, 0.3)], dim=1) * exists[:, :, None]
    extra = torch.randn(EXTRA, 4)
    taught = torch.nn.functional.normalize(torch.randn(EXTRA, TEACHER_WIDTH), dim=1).half()
    mine_of_extra = slice(rank * EXTRA // size, (rank + 1) * EXTRA // size)
    text = torch.cat([text, towers[1](extra[mine_of_extra])])
    text_tokens = torch.cat([text_tokens, text_tokens[: EXTRA // size]])  # of texts without images no loss reads any
    features = Features(image, text, towers[0](images[mine].relu()), image_tokens, text_tokens)
    seen = make_batch(torch.arange(BATCH)[mine])
    prepared = objective.prepare(seen, np.arange(BATCH), 0)
    assert prepared.targets is not None
    targets = dataclasses.replace(prepared.targets, extra_text_eD=taught[mine_of_extra])
    prepared = dataclasses.replace(prepared, targets=targets)
    total, terms = objective(features, scale.exp(), prepared)
    averager.watch()
    total.backward()  # type: ignore[no-untyped-call]
    averager.finish()
    assert all(parameter.grad is not None for parameter in trained)
    loss = float(objective.values(terms).sum())
    return loss, [parameter.grad.numpy().copy() for parameter in trained if parameter.grad is not None]


def gather_statistics(rank: int, size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Normalise this process's rows in training; return the running statistics before and after they are shared."""
    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(5))
    norm(torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(rank)))
    own = [buffer.numpy().copy() for buffer in norm.buffers()]
    share_statistics(norm, Machine(rank, size, rank, torch.device("cpu")))
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
    assert gather_rows(rows, 1) is rows


def test_masked_images_reach_no_other_loss() -> None:
    """Neither the value nor the gradients of the other losses depend on them."""

    def terms(masked: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        parameters = LossParameters(OWN_SCALES, WIDTH, TEACHER_WIDTH, 1, fused_width=TEACHER_WIDTH)
        teacher = FixedTeacher(SharedSpace(TEACHER_WIDTH, is_learned=True), 30.0, None, torch.device("cpu"), 1)
        objective = Objective(WEIGHTS, parameters, teacher, Machine(0, 1, 0, torch.device("cpu")))
        prepared = objective.prepare(make_batch(torch.arange(BATCH)), np.arange(BATCH), 0)
        random = torch.Generator().manual_seed(2)
        image, text = torch.randn(2, BATCH, WIDTH, generator=random)
        _, found = objective(
            Features(image, text, masked.requires_grad_(), image[:, None], text[:, None]), torch.tensor(5.0), prepared
        )
        others = torch.stack([value for name, value in found.items() if name != "mfd"]).sum()
        (gradient,) = torch.autograd.grad(others, masked, allow_unused=True, materialize_grads=True, retain_graph=True)
        assert torch.autograd.grad(found["mfd"], masked)[0].abs().sum() > 0
        return found, gradient

    (some, gradient), (other, _) = terms(torch.ones(BATCH, WIDTH)), terms(torch.eye(BATCH, WIDTH))
    assert gradient.abs().sum() == 0
    assert [name for name in WEIGHTS if some[name] != other[name]] == ["mfd"]
