"""A student in training: groups, schedule, order of gradients, parts of a batch, averages of weights, Muon."""

from __future__ import annotations

import copy
import dataclasses
import math

import open_clip
import pytest
import torch
from conftest import TINY_CONFIG
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from clipcid_cli.algorithms.losses.registry import LOSSES
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace
from clipcid_cli.runtime.models.tower_modules import freeze
from clipcid_cli.training.gradients import Features, GradCache, backward_order
from clipcid_cli.training.measurements import Measurements
from clipcid_cli.training.optimisers import Muon, Recipe, matrices_of, orthogonalise
from clipcid_cli.training.train_state import MAX_LOG_SCALE, TrainState, count_checkpoint_bytes

RECIPE = Recipe(
    optimizer="adamw", lr=1e-2, weight_decay=0.3, betas=(0.9, 0.98), eps=1e-6, warmup=2, steps=8, max_norm=1.0
)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = open_clip.CLIP(**TINY_CONFIG)
    return model


def test_only_matrices_of_the_student_are_decayed() -> None:
    model = make_model()
    parameters = LossParameters([LOSSES["instance"], LOSSES["cluster"]], 32, SharedSpace(64, is_learned=True), seed=0)
    state = TrainState(model, parameters, RECIPE)
    decayed, plain = state.optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    in_plain = {names.get(id(parameter), "loss") for parameter in plain["params"]}
    assert {"logit_scale", "ln_final.weight", "visual.ln_pre.bias", "loss", "visual.class_embedding"} <= in_plain
    assert {id(p) for p in parameters.parameters()} <= {id(p) for p in plain["params"]}
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    everything = [*model.parameters(), *parameters.parameters()]
    assert sorted(map(id, [*decayed["params"], *plain["params"]])) == sorted(map(id, everything))


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_gradients_arrive_in_the_order_in_which_they_are_sent(grad_checkpointing: bool) -> None:
    model = make_model()
    model.set_grad_checkpointing(grad_checkpointing)  # type: ignore[operator]
    model.train()
    state = TrainState(model, LossParameters([], 32, SharedSpace(32), seed=0), RECIPE)
    arrived: list[int] = []
    for parameter in state.parameters:
        parameter.register_post_accumulate_grad_hook(lambda parameter: arrived.append(id(parameter)))
    tokens = torch.randint(1, 49407, (4, 12))
    image, text = model.encode_image(torch.randn(4, 3, 32, 32)), model.encode_text(tokens)  # type: ignore[operator]
    torch.autograd.backward([image, text], [torch.ones_like(image), torch.ones_like(text)])
    sent = [
        id(parameter) for tower in backward_order(model) for parameter in tower if parameter is not model.logit_scale
    ]
    assert sorted(arrived) == sorted(sent)
    place = {parameter: number for number, parameter in enumerate(arrived)}
    # Until any number of them can be sent, at most a layer's further ones arrive.
    latest = 0
    for number, parameter in enumerate(sent):
        latest = max(latest, place[parameter])
        assert latest - number <= 4


def test_scales_start_at_clips_and_never_exceed_a_hundred_unless_frozen() -> None:
    model, parameters = make_model(), LossParameters([LOSSES["instance"]], 32, SharedSpace(32), seed=0)
    state = TrainState(model, parameters, RECIPE)
    scales = {name: math.exp(value.detach()) for name, value in state.log_scales.items()}
    assert scales == pytest.approx({"student": 1 / 0.07, "instance": 1 / 0.07}, rel=1e-6)
    with torch.no_grad():
        parameters.log_scales["instance"].fill_(9.0)
    parameters.log_scales["instance"].grad = torch.tensor(0.0)
    state.update()
    assert math.exp(state.log_scales["instance"].detach()) == pytest.approx(100)
    model.logit_scale.requires_grad_(False).fill_(5.0)  # type: ignore[operator]  # a parameter
    state = TrainState(model, parameters, RECIPE)
    state.update()
    assert float(state.log_scales["student"]) == 5.0


def test_float16_gradients_are_scaled_and_an_overflow_is_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.logit_scale = nn.Parameter(torch.tensor(1.0))

    model = Model()
    recipe = dataclasses.replace(RECIPE, lr=0.1, weight_decay=0.0, warmup=0)
    state = TrainState(model, LossParameters([], 2, SharedSpace(2), seed=0), recipe, torch.float16)
    state.backward(3 * model.weight.sum())
    assert model.weight.grad is not None
    assert float(model.weight.grad.max()) > 1000  # scaled up
    assert float(state.clip_grad_norm()) == pytest.approx(6.0)  # and down again before it is clipped
    state.update()
    assert not torch.equal(model.weight.detach(), torch.ones(2, 2))
    before, scale = model.weight.detach().clone(), state.state_dict()["scaler"]["scale"]
    state.backward(torch.inf * model.weight.sum())
    assert state.may_overflow
    state.clip_grad_norm()
    state.update()
    assert torch.equal(model.weight.detach(), before)
    assert state.state_dict()["scaler"]["scale"] == scale / 2


def add(measurements: Measurements, losses: list[float], norm: float, scale: float) -> None:
    first, second = torch.tensor(losses)
    measurements.add({"first": first, "second": second, "norm": torch.tensor(norm)}, {"scale": torch.tensor([scale])})


@pytest.mark.parametrize("bad", [([math.nan, 2.0], 3.0), ([1.0, math.inf], 3.0), ([1.0, 2.0], -math.inf)])
def test_values_are_those_of_the_last_step_or_of_the_first_that_is_not_finite(bad: tuple[list[float], float]) -> None:
    measurements = Measurements(torch.device("cpu"))
    add(measurements, [1.5, 2.5], 3.0, math.inf)
    sent = measurements.send()
    add(measurements, *bad, 5.0)
    first = {"first": 1.5, "second": 2.5, "norm": 3.0, "scale": math.inf}
    assert sent.read() == (1, first), "what is not checked may be anything, and later steps change nothing"
    add(measurements, [7.0, 8.0], 9.0, 10.0)
    num_finite, kept = measurements.send().read()
    assert num_finite == 1
    assert list(kept.values()) == pytest.approx([*bad[0], bad[1], 5.0], nan_ok=True)


class Towers(nn.Module):
    """Two small towers, of which one has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(6, 5)
        self.text = nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 5))

    def forward(self, rows: Tensor) -> Features:
        return Features(self.visual(rows), self.text(rows))


def loss_of(features: Features) -> Tensor:
    image, text = (nn.functional.normalize(rows, dim=1) for rows in (features.image, features.text))
    return nn.functional.cross_entropy(5 * image @ text.T, torch.arange(len(image)))


def test_parts_give_the_gradients_of_autograd_with_the_same_dropout_both_times() -> None:
    torch.manual_seed(1)
    towers, parts = Towers().train(), torch.randn(8, 6).chunk(4)
    encoded = []
    for seed, part in enumerate(parts):
        torch.manual_seed(seed)
        encoded.append(towers(part))
    whole = Features(torch.cat([part.image for part in encoded]), torch.cat([part.text for part in encoded]))
    loss_of(whole).backward()
    expected = [parameter.grad for parameter in towers.parameters()]

    towers.zero_grad()
    cache = GradCache(lambda number: towers(parts[number]), range(4))
    loss_of(cache.features).backward()
    cache.backward(lambda: None)
    for parameter, wanted in zip(towers.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


class WithStatistics(nn.Module):
    """A tower with batch normalisation, and what every CLIP has."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.text = nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.tensor(MAX_LOG_SCALE - 0.02))


def test_trained_weights_and_statistics_are_averaged_over_all_steps_and_the_rest_is_the_students() -> None:
    torch.manual_seed(0)
    model, decay = WithStatistics(), 0.4  # it takes three steps to reach that
    freeze(model, "text")
    state = TrainState(model, LossParameters([], 4, SharedSpace(4), seed=0), RECIPE, ema=decay)
    assert state.ema is not None
    averaged = {
        "visual.0.weight", "visual.0.bias", "visual.1.weight", "visual.1.bias", "visual.1.running_mean",
        "visual.1.running_var", "logit_scale",
    }  # fmt: skip
    assert set(state.ema.state_dict()["averages"]) == averaged
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(1, 8):
        # It drives the logit scale to its limit.
        (model.visual(torch.randn(5, 3)).square().mean() - 9 * model.logit_scale).backward()
        state.clip_grad_norm()
        state.update()
        keep = min(decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = keep * expected[name] + (1 - keep) * tensor if name in averaged else tensor.clone()
        with state.ema.swapped_in():
            torch.testing.assert_close(dict(model.state_dict()), expected)
            assert float(model.logit_scale.detach()) <= MAX_LOG_SCALE
    assert float(model.logit_scale.detach()) == pytest.approx(MAX_LOG_SCALE)


MUON = dataclasses.replace(RECIPE, optimizer="muon")
SHAPES = ((24, 8), (8, 8), (8, 24), (24, 8))


@pytest.mark.parametrize(("optimizer", "ema"), [("adamw", None), ("muon", 0.9)])
def test_the_bytes_of_a_checkpoint_are_known_before_the_first_step(optimizer: str, ema: float | None) -> None:
    model, recipe = make_model(), dataclasses.replace(RECIPE, optimizer=optimizer)
    freeze(model, "image")
    counted = count_checkpoint_bytes(model, recipe, ema=ema is not None)
    state = TrainState(model, LossParameters([], 32, SharedSpace(32), seed=0), recipe, ema=ema)
    for parameter in state.parameters:
        parameter.grad = torch.ones_like(parameter)
    state.update()
    tensors = [value for value in tree_leaves(state.state_dict()) if isinstance(value, Tensor)]
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(counted, rel=1e-3)


def parameters(shapes: tuple[tuple[int, ...], ...]) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def take_steps(of: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(6):
        for parameter in of:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()


def muon(matrices: list[nn.Parameter], others: list[nn.Parameter]) -> Muon:
    groups = [
        {"params": others, "weight_decay": 0.1, "matrices": False},
        {"params": matrices, "weight_decay": 0.1, "matrices": True},
    ]
    return Muon(groups, 0.02, (0.9, 0.98), 1e-6, torch.float32)


def test_updates_are_pytorchs() -> None:
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    take_steps(ours, muon(ours, []))
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    take_steps(theirs, torch.optim.Muon(theirs, **options))
    for one, other, before in zip(ours, theirs, parameters(SHAPES), strict=True):
        # PyTorch's are rounded to bfloat16, eight bits.
        moved = (other - before).norm()
        assert (one - other).norm() < 0.02 * moved


def test_what_is_no_matrix_is_updated_by_adamw_to_the_bit() -> None:
    shapes = ((7,), (), (5, 3, 2, 2))
    ours, theirs = parameters(shapes), parameters(shapes)
    take_steps(ours, muon(parameters(SHAPES), ours))
    options = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, "fused": True}
    take_steps(theirs, torch.optim.AdamW(theirs, **options))
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
    model = make_model()
    kinds = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    layers = [name for name in dict(model.named_parameters()) if ".resblocks." in name and name.endswith(kinds)]
    assert matrices_of(model) == set(layers) != set()
    state = TrainState(model, LossParameters([LOSSES["instance"]], 32, SharedSpace(64, is_learned=True), seed=0), MUON)
    grouped = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    everything = [*model.parameters(), *state.of_losses.parameters()]
    assert sorted(map(id, grouped)) == sorted(map(id, everything))


@pytest.mark.parametrize("what", ["matrix", "vector"])
def test_an_overflow_skips_the_whole_update(what: str) -> None:
    model = make_model()
    state = TrainState(model, LossParameters([], 32, SharedSpace(32), seed=0), MUON, torch.float16)
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
