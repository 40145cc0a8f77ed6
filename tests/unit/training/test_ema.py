"""The average of the weights: its formula, and what it covers."""

from __future__ import annotations

import open_clip
import pytest
import torch
from conftest import TINY_CONFIG
from torch import nn

from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace
from clipcid_cli.runtime.models.towers import freeze
from clipcid_cli.training.optimisers import Recipe
from clipcid_cli.training.train_state import EMA, MAX_LOG_SCALE, TrainState

RECIPE = Recipe(
    optimizer="adamw", lr=1e-2, weight_decay=0.3, betas=(0.9, 0.98), eps=1e-6, warmup=2, steps=14, max_norm=1.0
)
USED = torch.tensor([3, 17, 999, 49406, 49407])
DECAY = 0.6  # below it for three steps, then at it


class WithStatistics(nn.Module):
    """A tower with batch normalisation, and what every CLIP has."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.text = nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.6))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = open_clip.CLIP(**TINY_CONFIG)
    return model


def make_state(model: nn.Module) -> TrainState:
    return TrainState(model, LossParameters([], 32, SharedSpace(32), seed=0), RECIPE, ema=DECAY)


def step_once(model: nn.Module, state: TrainState, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    tokens = USED[torch.randint(0, len(USED), (2, 12), generator=generator)]
    image, text = model.encode_image(pixels), model.encode_text(tokens)  # type: ignore[operator]
    # It drives the logit scale to its limit.
    ((image - text).square().mean() - 9 * model.logit_scale).backward()
    state.clip_grad_norm()
    state.update()


def test_it_is_the_average_of_all_steps() -> None:
    model = make_model()
    with torch.no_grad():
        model.logit_scale.fill_(MAX_LOG_SCALE - 0.05)
    state = make_state(model)
    assert state.ema is not None
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for step in range(14):
        step_once(model, state, step)
        keep = min(DECAY, (2 + step) / (11 + step))
        expected = {
            name: keep * expected[name] + (1 - keep) * tensor.double() for name, tensor in model.state_dict().items()
        }
        with state.ema.swapped_in():
            found = model.state_dict()
            assert 0 <= float(found["logit_scale"]) <= MAX_LOG_SCALE
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert float(model.logit_scale.detach()) == pytest.approx(MAX_LOG_SCALE)


def test_statistics_are_averaged_and_counts_and_frozen_weights_are_the_students() -> None:
    model = WithStatistics()
    freeze(model, "text")
    average = EMA(model, DECAY)
    means = [model.visual[1].running_mean.clone()]
    for step in range(3):
        model.visual(torch.randn(5, 3, generator=torch.Generator().manual_seed(step)))
        means.append(model.visual[1].running_mean.clone())
        average.update()
    expected = means[0]
    for number, mean in enumerate(means[1:], start=1):
        keep = min(DECAY, (1 + number) / (10 + number))
        expected = keep * expected + (1 - keep) * mean
    assert set(average.state_dict()["averages"]) == {
        "visual.0.weight", "visual.0.bias", "visual.1.weight", "visual.1.bias", "visual.1.running_mean",
        "visual.1.running_var", "logit_scale",
    }  # fmt: skip
    with average.swapped_in():
        torch.testing.assert_close(model.visual[1].running_mean, expected)
        assert int(model.visual[1].num_batches_tracked) == 3
