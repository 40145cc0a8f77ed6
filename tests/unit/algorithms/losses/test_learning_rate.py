"""The learning rate of a run that is given none."""

from __future__ import annotations

import pytest

from clipcid_cli.algorithms.losses.registry import LOSSES, PRESETS, RATES, default_rate
from clipcid_cli.steps.settings.distill import OPTIMIZERS


@pytest.mark.parametrize(
    ("losses", "optimizer", "batch_size", "width", "expected"),
    [
        (("clip",), "adamw", 64, 96, 1e-3),
        (("clip", "instance", "cluster"), "adamw", 64, 96, 3e-3),
        (("fd",), "adamw", 64, 96, 6e-3),
        (("clip", "mfd"), "adamw", 64, 96, 6e-3),
        (("clip",), "adamw", 256, 96, 2e-3),
        (("clip",), "adamw", 16, 96, 5e-4),
        (("clip",), "adamw", 90, 96, 1.2e-3),  # 1.186e-3 to two digits
        (("fd",), "adamw", 256, 96, 6e-3),  # where the width's share ends
        (("clip",), "adamw", 4096, 512, 1.1e-3),
        (("clip", "fd"), "adamw", 4096, 512, 1.1e-3),
        (("clip",), "adamw", 4096, 768, 7.5e-4),
        (("clip",), "muon", 64, 96, 3e-3),
        (("clip", "instance"), "muon", 64, 96, 6e-3),
        (("fd",), "muon", 16, 96, 3e-3),
        (("clip",), "muon", 4096, 512, 1.1e-3),
    ],
)
def test_rate_follows_losses_batch_and_width(
    losses: tuple[str, ...], optimizer: str, batch_size: int, width: int, expected: float
) -> None:
    assert default_rate(losses, optimizer, batch_size, width)[0] == expected


def test_reason_says_which_part_of_the_rule_decides() -> None:
    assert default_rate(("clip",), "muon", 64, 96)[1] == "losses led by captions: 0.003 x sqrt(batch size/64)"
    assert default_rate(("fd",), "adamw", 256, 512)[1] == (
        "losses led by a teacher's features: 0.006 x sqrt(batch size/64), "
        "at most 0.576/512 for an embedding of 512 dimensions"
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_presets_without_a_teacher_are_led_by_captions(optimizer: str) -> None:
    for losses in PRESETS.values():
        has_teacher = any(LOSSES[name].needs_teacher for name in losses)
        assert (default_rate(losses, optimizer, 64, 96)[0] > RATES[optimizer]["captions"]) == has_teacher
