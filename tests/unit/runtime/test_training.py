"""The trainer's parts: groups, schedule, checkpoints, logs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import TINY_CONFIG
from torch import nn

from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.checkpoint import checkpoint_path, list_checkpoints, read_checkpoint, write_checkpoint
from clipcid_cli.formats.results.run_folder import RunFolder, append_lines, read_lines
from clipcid_cli.runtime.training.trainer import LossParameters, OptimiserPlan, Trainer

PLAN = OptimiserPlan(
    optimizer="adamw", lr=1e-2, weight_decay=0.3, betas=(0.9, 0.98), eps=1e-6, warmup=2, steps=8, max_norm=1.0
)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = open_clip.CLIP(**TINY_CONFIG)
    return model


def step_once(model: nn.Module, trainer: Trainer, tokens: torch.Tensor, seed: int) -> None:
    pixels = torch.randn(len(tokens), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    image, text = model.encode_image(pixels), model.encode_text(tokens)  # type: ignore[operator]
    (image - text).square().mean().backward()
    trainer.limit_gradient()
    trainer.update()


def test_only_matrices_of_the_student_are_decayed() -> None:
    model, parameters = make_model(), LossParameters(["instance", "cluster"], 32, 64, seed=0)
    trainer = Trainer(model, parameters, PLAN)
    decayed, plain = trainer.optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert plain["weight_decay"] == 0.0
    in_plain = {names.get(id(parameter), "loss") for parameter in plain["params"]}
    assert {"logit_scale", "ln_final.weight", "visual.ln_pre.bias", "loss", "visual.class_embedding"} <= in_plain
    assert {id(p) for p in parameters.parameters()} <= {id(p) for p in plain["params"]}
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    everything = [*model.parameters(), *parameters.parameters()]
    assert sorted(map(id, [*decayed["params"], *plain["params"]])) == sorted(map(id, everything))


def test_schedule_warms_up_then_follows_a_cosine_to_zero() -> None:
    rates = [PLAN.rate_at(step) for step in range(8)]
    assert rates[:3] == [5e-3, 1e-2, 1e-2]
    assert rates[5] == pytest.approx(0.5e-2)
    assert rates[7] == pytest.approx(0.5e-2 * (1 + math.cos(math.pi * 5 / 6)))
    assert PLAN.rate_at(8) == pytest.approx(0)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_gradients_arrive_in_the_order_in_which_they_are_sent(grad_checkpointing: bool) -> None:
    model = make_model()
    model.set_grad_checkpointing(grad_checkpointing)  # type: ignore[operator]
    model.train()
    trainer = Trainer(model, LossParameters([], 32, None, seed=0), PLAN)
    arrived: list[int] = []
    for parameter in trainer.parameters:
        parameter.register_post_accumulate_grad_hook(lambda parameter: arrived.append(id(parameter)))
    tokens = torch.randint(1, 49407, (4, 12))
    image, text = model.encode_image(torch.randn(4, 3, 32, 32)), model.encode_text(tokens)  # type: ignore[operator]
    torch.autograd.backward([image, text], [torch.ones_like(image), torch.ones_like(text)])
    sent = [id(parameter) for tower in trainer.of_towers for parameter in tower]
    assert sorted(arrived) == sorted(sent)
    place = {parameter: number for number, parameter in enumerate(arrived)}
    # Until any number of them can be sent, at most a layer's further ones arrive.
    latest = 0
    for number, parameter in enumerate(sent):
        latest = max(latest, place[parameter])
        assert latest - number <= 4


def test_scales_start_at_clips_and_never_exceed_a_hundred() -> None:
    model, parameters = make_model(), LossParameters(["instance"], 32, None, seed=0)
    trainer = Trainer(model, parameters, PLAN)
    scales = {name: math.exp(value.detach()) for name, value in trainer.log_scales().items()}
    assert scales == pytest.approx({"student": 1 / 0.07, "instance": 1 / 0.07}, rel=1e-6)
    with torch.no_grad():
        parameters.log_scales["instance"].fill_(9.0)
    parameters.log_scales["instance"].grad = torch.tensor(0.0)
    trainer.update()
    assert math.exp(trainer.log_scales()["instance"].detach()) == pytest.approx(100)


def test_trainer_goes_back_to_a_checkpoint_exactly(tmp_path: Path) -> None:
    tokens = torch.full((2, 12), 5)
    model = make_model()
    trainer = Trainer(model, LossParameters(["icl"], 32, 8, seed=0), PLAN)
    for step in range(3):
        step_once(model, trainer, tokens, step)
    write_checkpoint(tmp_path, 3, trainer.state())
    for step in range(3, 6):
        step_once(model, trainer, tokens, step)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = make_model()
    resumed = Trainer(other, LossParameters(["icl"], 32, 8, seed=5), PLAN)
    resumed.load(read_checkpoint(tmp_path, 3))
    assert resumed.step == 3
    for step in range(3, 6):
        step_once(other, resumed, tokens, step)
    for name, tensor in expected.items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_newest_two_checkpoints_are_kept_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, {"step": step})
    assert list_checkpoints(tmp_path) == [20, 30]
    path = checkpoint_path(tmp_path, 30)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ClipcidError, match=r"step_00000030\.pt cannot be read"):
        read_checkpoint(tmp_path, 30)


def test_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "harmed"),))

    torch.save({"step": Harmful()}, checkpoint_path(tmp_path, 1))
    with pytest.raises(ClipcidError):
        read_checkpoint(tmp_path, 1)
    assert not (tmp_path / "harmed").exists()


def test_logs_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    append_lines(run.train_log, [{"step": step, "loss": 1 / step} for step in range(1, 8)])
    append_lines(run.results_log, [{"step": 4}, {"step": 6}])
    with run.train_log.open("a") as file:
        file.write('{"step": 8, "lo')  # what a kill left
    run.rewind(5)
    assert [line["step"] for line in read_lines(run.train_log)] == [1, 2, 3, 4, 5]
    assert read_lines(run.results_log) == [{"step": 4}]
    assert all(json.loads(line) for line in run.train_log.read_text().splitlines())
