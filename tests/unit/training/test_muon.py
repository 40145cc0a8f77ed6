"""Muon against PyTorch's, against a singular value decomposition, and what it leaves to AdamW."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from conftest import TINY_CONFIG
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace
from clipcid_cli.training.optimisers import Muon, Recipe, matrices_of, orthogonalise
from clipcid_cli.training.train_state import TrainState

RECIPE = Recipe(
    optimizer="muon", lr=1e-2, weight_decay=0.3, betas=(0.9, 0.98), eps=1e-6, warmup=2, steps=8, max_norm=1.0
)
SHAPES = ((24, 8), (8, 8), (8, 24), (24, 8))


def parameters(shapes: tuple[tuple[int, ...], ...]) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def set_gradients(of: list[nn.Parameter], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in of:
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def muon(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Muon:
    groups = [
        {"params": others, "weight_decay": 0.1, "matrices": False},
        {"params": matrices, "weight_decay": 0.1, "matrices": True},
    ]
    return Muon(groups, 0.02, (0.9, 0.98), 1e-6, torch.float32)


def test_updates_are_pytorchs() -> None:
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    first = copy.deepcopy(ours)
    optimizer = muon(ours, [])
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(6):
        for each, of in ((ours, optimizer), (theirs, reference)):
            set_gradients(each, step)
            of.step()
    for one, other, before in zip(ours, theirs, first, strict=True):
        # PyTorch's are rounded to bfloat16, eight bits.
        moved = (other - before).norm()
        assert (one - other).norm() < 0.02 * moved


def test_what_is_no_matrix_is_updated_by_adamw_to_the_bit() -> None:
    shapes = ((7,), (), (5, 3, 2, 2))
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer = muon(parameters(SHAPES), ours)
    reference = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True)
    for step in range(3):
        for each, of in ((ours, optimizer), (theirs, reference)):
            set_gradients(each, step)
            of.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@given(st.integers(1, 9), st.integers(0, 20), st.integers(1, 3), st.integers(0, 2**20))
def test_singular_values_come_near_one_and_vectors_stay(rows: int, more: int, number: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(number, rows, rows, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(number, rows + more, rows, generator=draw, dtype=torch.float64)).Q
    values = torch.rand(number, rows, generator=draw, dtype=torch.float64) * 0.95 + 0.05
    found = orthogonalise(left @ torch.diag_embed(values) @ right.mT, torch.float64)
    changed = left.mT @ found @ right
    diagonal = torch.diagonal(changed, dim1=1, dim2=2)
    assert (changed - torch.diag_embed(diagonal)).abs().max() < 1e-9
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3


def test_matrices_of_the_towers_are_muons_and_tables_are_not() -> None:
    model = open_clip.CLIP(**TINY_CONFIG)
    kinds = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    layers = [name for name in dict(model.named_parameters()) if ".resblocks." in name and name.endswith(kinds)]
    assert matrices_of(model) == set(layers) != set()
    state = TrainState(model, LossParameters(["instance"], 32, SharedSpace(64, is_learned=True), seed=0), RECIPE)
    grouped = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    everything = [*model.parameters(), *state.of_losses.parameters()]
    assert sorted(map(id, grouped)) == sorted(map(id, everything))


@pytest.mark.parametrize("what", ["matrix", "vector"])
def test_an_overflow_skips_the_whole_update(what: str) -> None:
    model = open_clip.CLIP(**TINY_CONFIG)
    state = TrainState(model, LossParameters([], 32, SharedSpace(32), seed=0), RECIPE, torch.float16)
    before = copy.deepcopy(dict(model.named_parameters()))
    matrix = model.transformer.resblocks[0].mlp.c_fc.weight
    assert any(matrix is each for each in state.optimizer.param_groups[2]["params"])
    state.backward(matrix.sum() + model.ln_final.weight.sum())
    hurt = matrix if what == "matrix" else model.ln_final.weight
    assert hurt.grad is not None
    hurt.grad.flatten()[0] = torch.inf
    state.clip_grad_norm()
    state.update()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
