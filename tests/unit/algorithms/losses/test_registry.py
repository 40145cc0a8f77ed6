"""The table of losses: complete and consistent; the weights of a preset, and the learning rate they ask for."""

from __future__ import annotations

import inspect

import pytest

from clipcid_cli.algorithms.losses.registry import LOSSES, PRESETS, RATES, default_rate, load_loss, select_losses
from clipcid_cli.steps.settings.distill import OPTIMIZERS


@pytest.mark.parametrize("name", LOSSES)
def test_entry_is_complete(name: str) -> None:
    entry = LOSSES[name]
    assert entry.name == name
    assert entry.summary
    assert entry.summary[-1] != "."  # help pages join summaries into lists
    function = load_loss(name)
    assert "Source: " in (inspect.getdoc(function) or "")
    learned = {"scale": entry.scale is not None, "fusion": entry.fuses}
    assert list(inspect.signature(function).parameters) == [
        "batch",
        *(part for part, is_own in learned.items() if is_own),
    ]
    assert entry.needs_teacher or (entry.space == "own" and not entry.needs_clusters and entry.one_tower)
    assert [each.name for each in LOSSES.values() if each.function == entry.function] == [name]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_losses_and_is_led_by_its_teacher_if_it_has_one(preset: str) -> None:
    losses = PRESETS[preset]
    assert list(select_losses(preset, {})) == [name for name in LOSSES if name in losses]
    has_teacher = any(LOSSES[name].needs_teacher for name in losses)
    for optimizer in OPTIMIZERS:
        assert (default_rate(losses, optimizer, 64, 96)[0] > RATES[optimizer]["captions"]) == has_teacher


def test_overrides_change_a_preset() -> None:
    chosen = select_losses("clip-kd", {"crd": 0.5, "icl": 0.0, "affinity": 2.0})
    assert list(chosen) == ["clip", "fd", "crd", "affinity"]
    assert chosen["crd"].at(10) == 0.5
    assert chosen["fd"].at(500) == 4.0


def test_the_default_follows_features_as_far_as_the_teacher_is_trusted() -> None:
    assert select_losses("fd-instance", {}, trust=1.0) == PRESETS["fd-instance"]
    chosen = select_losses("fd-instance", {}, trust=0.1)
    assert [weight.at(500) for weight in chosen.values()] == pytest.approx([0.91, 1 - 1 / 15, 0.4])
    assert select_losses("fd-instance", {"fd": 3.0}, trust=0.1)["fd"].at(500) == 3.0
    assert select_losses("clip-kd", {}, trust=0.1) == PRESETS["clip-kd"]


@pytest.mark.parametrize(
    ("losses", "optimizer", "batch_size", "width", "expected"),
    [
        (("clip",), "adamw", 64, 96, 1e-3),
        (("clip", "instance", "cluster"), "adamw", 64, 96, 3e-3),
        (("fd",), "adamw", 64, 96, 6e-3),
        (("clip", "mfd"), "adamw", 64, 96, 6e-3),
        (("clip",), "adamw", 256, 96, 2e-3),
        (("clip",), "adamw", 90, 96, 1.2e-3),  # 1.186e-3 to two digits
        (("fd",), "adamw", 256, 96, 6e-3),  # where the width's share ends
        (("clip",), "adamw", 4096, 512, 1.1e-3),
        (("clip",), "adamw", 4096, 768, 7.5e-4),
        (("clip",), "muon", 64, 96, 3e-3),
        (("clip", "instance"), "muon", 64, 96, 6e-3),
        (("fd",), "muon", 16, 96, 3e-3),
        (("clip",), "muon", 4096, 512, 1.1e-3),
    ],
)
def test_the_rate_follows_losses_batch_and_width(
    losses: tuple[str, ...], optimizer: str, batch_size: int, width: int, expected: float
) -> None:
    assert default_rate(losses, optimizer, batch_size, width)[0] == expected
    lr, reason = default_rate(losses, optimizer, batch_size, width, trained=True)
    assert lr == pytest.approx(expected / 10, rel=0.05)  # of two digits
    assert reason.endswith("; 0.1 of that, since the student starts from trained weights")


def test_the_reason_says_which_part_of_the_rule_decides() -> None:
    assert default_rate(("clip",), "muon", 64, 96)[1] == "losses led by captions: 0.003 x sqrt(batch size/64)"
    assert default_rate(("fd",), "adamw", 256, 512)[1] == (
        "losses led by a teacher's features: 0.006 x sqrt(batch size/64), "
        "at most 0.576/512 for an embedding of 512 dimensions"
    )
