"""The table of losses: complete, consistent, and read without torch."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from clipcid_cli.algorithms.losses.registry import LOSSES, PRESETS, load_loss, select_losses


@pytest.mark.parametrize("name", LOSSES)
def test_entry_is_complete(name: str) -> None:
    entry = LOSSES[name]
    assert entry.name == name
    assert entry.summary
    assert entry.summary[-1] != "."  # help pages join summaries into lists
    function = load_loss(name)
    assert "Source: " in (inspect.getdoc(function) or "")
    learned = {"scale": entry.scale is not None, "bias": entry.bias is not None, "fusion": entry.fuses}
    assert list(inspect.signature(function).parameters) == [
        "batch",
        *(part for part, is_own in learned.items() if is_own),
    ]
    assert entry.needs_teacher or (entry.space == "own" and not entry.needs_clusters)


def test_functions_are_losses_of_their_own() -> None:
    assert len({entry.function for entry in LOSSES.values()}) == len(LOSSES)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_names_known_losses(preset: str) -> None:
    assert set(PRESETS[preset]) <= set(LOSSES)
    assert list(select_losses(preset, {})) == [name for name in LOSSES if name in PRESETS[preset]]


def test_clip_rd_is_clip_kd_and_two_more() -> None:
    extra = {name: weight.value for name, weight in PRESETS["clip-rd"].items() if name not in PRESETS["clip-kd"]}
    assert extra == {"vrd": 1.0, "xrd": 1.0}
    assert PRESETS["clip-kd"].items() <= PRESETS["clip-rd"].items()


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


def test_a_loss_without_a_teacher_is_served_by_any() -> None:
    assert all(entry.one_tower for entry in LOSSES.values() if not entry.needs_teacher)


def test_registry_is_read_without_torch() -> None:
    code = "import sys; import clipcid_cli.steps.settings.distill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
