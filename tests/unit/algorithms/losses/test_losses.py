"""Every loss against a float64 formula written with NumPy alone, and the table of losses, presets and learning rates."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_data import (
    SCALE,
    TEACHER_BIAS,
    B,
    compute,
    formula,
    formula_rows,
    make_batch,
    make_numbers,
    slopes,
    unit,
    with_gradients,
)

from clipcid_cli.algorithms.losses import batch as batch_module
from clipcid_cli.algorithms.losses.batch import ClusterTargets, LossBatch
from clipcid_cli.algorithms.losses.cluster import draw_candidates
from clipcid_cli.algorithms.losses.rates import RATES, default_rate
from clipcid_cli.algorithms.losses.registry import (
    CLUSTERS,
    LOSSES,
    PRESETS,
    SAMPLE_INPUTS,
    LossEntry,
    load_loss,
    select_losses,
)
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace, principal_axes, second_moment
from clipcid_cli.steps.settings.distill import OPTIMIZERS, DistillSettings

NAMES = tuple(LOSSES)
ONE_TOWER = [name for name in NAMES if LOSSES[name].needs_teacher and LOSSES[name].one_tower]
SCALES = torch.tensor(SCALE, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_slope_of_the_formula_in_small_blocks_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that a loss holds are held by the slope."""
    numbers = make_numbers()
    slopes_of_rows = slopes(name, numbers)
    for own, block_entries in ((slice(None), batch_module.BLOCK_ENTRIES), (slice(2, 5), 2 * B)):
        monkeypatch.setattr(batch_module, "BLOCK_ENTRIES", block_entries)
        _, gradients = with_gradients(name, make_batch(numbers, own=own))
        for gradient, slope in zip(gradients, slopes_of_rows, strict=True):
            np.testing.assert_allclose(gradient, slope[..., own].sum(axis=-1) / B, rtol=1e-6, atol=1e-8)
        assert abs(gradients[0]).sum() > 0


@functools.cache
def rows_of(name: str) -> np.ndarray:
    return formula_rows(name, make_numbers(), cluster_towers="sv")


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, B - 1), st.integers(1, B), st.integers(1, 30 * B))
@settings(max_examples=20)
def test_share_of_any_rows_in_any_blocks_equals_its_formula(name: str, first: int, count: int, entries: int) -> None:
    own = slice(first, min(B, first + count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "BLOCK_ENTRIES", entries)
        share = float(compute(name, make_batch(make_numbers(), cluster_towers="sv", own=own), SCALES))
    assert share == pytest.approx(rows_of(name)[own].sum() / B, rel=1e-12)


def test_large_batches_keep_no_matrix_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, num_centroids = 1_024, 9_000
    random = np.random.default_rng(0)
    image, text, centroids = (
        torch.from_numpy(unit(random.normal(size=(count, 4))).astype(np.float32))
        for count in (rows, rows, num_centroids)
    )
    targets = ClusterTargets(centroids, torch.zeros(num_centroids), centroids[:rows])
    image.requires_grad_()
    batch = LossBatch(image, text, torch.tensor(1.0), image, text, image_clusters=targets)

    def sum_and_num_kept(name: str) -> tuple[float, int]:
        kept = list[int]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = compute(name, batch, SCALES.float())
        (gradient,) = torch.autograd.grad(value, image)
        return float(gradient.abs().sum()), sum(kept)

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "BLOCK_ENTRIES", rows * num_centroids)
        plain = {name: sum_and_num_kept(name) for name in ("clip", "cluster")}
    monkeypatch.setattr(batch_module, "BLOCK_ENTRIES", rows**2 - 1)
    assert sum_and_num_kept("clip")[1] < rows**2 // 8  # of a CPU; and now of a GPU
    monkeypatch.setattr(batch_module, "block_entries", lambda _: 1 << 28)
    for name, (gradient, num_kept) in plain.items():
        assert num_kept >= rows**2, name
        again, num_kept = sum_and_num_kept(name)
        assert num_kept < rows**2 // 8, name
        assert again == pytest.approx(gradient, rel=1e-6)


@pytest.mark.parametrize(("memory", "entries"), [(80, 1 << 28), (16, 1 << 26), (1, 1 << 23)])
def test_blocks_on_a_gpu_fit_its_memory(memory: int, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=memory * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert batch_module.block_entries(torch.device("cuda", 0)) == entries
    assert batch_module.block_entries(torch.device("cpu")) == batch_module.BLOCK_ENTRIES == 1 << 23


@pytest.mark.parametrize("name", [name for name in ONE_TOWER if name != "cluster"])
def test_a_text_tower_that_is_not_trained_leaves_the_images_half(name: str) -> None:
    """It is the teacher's: its rows are u. `fd` compares images with images, `instance` with captions."""
    numbers = make_numbers()
    numbers["v"] = numbers["u"]
    kept = dataclasses.replace(make_batch(numbers), trains_text=False)
    is_same_tower = LOSSES[name].image_alone
    expected = formula(name, numbers, towers="t" if is_same_tower else "u", cluster_towers="")
    assert float(compute(name, kept, SCALES)) == pytest.approx(expected, rel=1e-9)
    alone = dataclasses.replace(kept, teacher_text_BD=None, text_Bd=kept.text_Bd[:0], text_BD=kept.text_BD[:0])
    if is_same_tower:
        assert compute(name, alone, SCALES) == compute(name, kept, SCALES)


@pytest.mark.parametrize("name", ONE_TOWER)
@pytest.mark.parametrize("tower", ["t", "u"])
def test_one_tower_leaves_its_half(name: str, tower: str) -> None:
    numbers = make_numbers()
    student = {"t": "s", "u": "v"}[tower]
    batch = make_batch(numbers, towers=tower, cluster_towers=student)
    expected = formula(name, numbers, towers=tower, cluster_towers=student)
    assert float(compute(name, batch, SCALES)) == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(formula(name, numbers, cluster_towers="sv"), rel=1e-3)


@pytest.mark.parametrize("teacher_bias", [TEACHER_BIAS, None])
def test_targets_of_siglip_kd_are_the_teachers_sigmoid_or_else_its_softmax(teacher_bias: float | None) -> None:
    batch = make_batch(make_numbers(), teacher_bias=teacher_bias)
    found = float(compute("siglip-kd", batch, SCALES))
    assert found == pytest.approx(formula("siglip-kd", make_numbers(), teacher_bias=teacher_bias), rel=1e-12)


def test_fusion_layers_learn_from_any_share_of_rows() -> None:
    parameters = LossParameters([LOSSES["afd"]], 5, SharedSpace(5), seed=0).double()
    assert sum(p.numel() for p in parameters.parameters()) == 2 * 5 * (10 + 1) + 1

    def gradients(own: slice) -> list[torch.Tensor]:
        value = load_loss("afd")(make_batch(make_numbers(), own=own), **parameters.of("afd"))
        return list(torch.autograd.grad(value, list(parameters.parameters())))

    for whole, *parts in zip(gradients(slice(None)), gradients(slice(0, 3)), gradients(slice(3, B)), strict=True):
        assert whole.abs().sum() > 0
        torch.testing.assert_close(sum(parts), whole)


def test_axes_keep_what_lies_in_few_dimensions() -> None:
    random = np.random.default_rng(0)
    rows = (random.normal(size=(200, 3)) @ random.normal(size=(3, 10))).astype(np.float16)
    moment = second_moment([rows[:90], rows[90:91], rows[91:]], 10)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(moment, wide.T @ wide, rtol=1e-12, atol=1e-12)
    found = principal_axes(moment, 3)
    assert found.kept == pytest.approx(1, abs=1e-5)
    axes = found.basis_Dd.double().numpy()
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    # Dot products survive: that is what the losses see.
    np.testing.assert_allclose((wide @ axes) @ (wide @ axes).T, wide @ wide.T, rtol=1e-3, atol=1e-2)
    half = principal_axes(moment, 1)
    assert half.kept == pytest.approx(((wide @ half.basis_Dd.numpy()) ** 2).sum() / (wide**2).sum(), rel=1e-6)
    assert (axes[np.abs(axes).argmax(axis=0), range(3)] > 0).all()


@given(
    named=st.lists(st.integers(0, 399), min_size=1, max_size=40),
    num_clusters=st.integers(1, 400),
    ratio=st.floats(0, 1),
    minimum=st.integers(0, 500),
    seed=st.integers(0, 2**40),
)
def test_candidates_hold_all_named_and_enough_others_once(
    named: list[int], num_clusters: int, ratio: float, minimum: int, seed: int
) -> None:
    named_B1 = np.array(named)[:, None] % num_clusters
    found = draw_candidates(named_B1, num_clusters, ratio=ratio, minimum=minimum, seed=seed)
    active = set(named_B1.ravel().tolist())
    assert set(found.ids[: len(active)].tolist()) == active
    assert len(set(found.ids.tolist())) == len(found.ids)
    assert found.ids.min() >= 0
    assert found.ids.max() < num_clusters
    assert len(found.ids) >= min(num_clusters, minimum)
    drawn = len(found.ids) - len(active)
    rest = num_clusters - len(active)
    assert drawn >= min(rest, math.ceil(ratio * num_clusters))
    assert not found.log_correction_S[: len(active)].any()
    assert np.allclose(found.log_correction_S[len(active) :], math.log(rest / drawn) if drawn else 0.0)
    again = draw_candidates(named_B1[::-1], num_clusters, ratio=ratio, minimum=minimum, seed=seed)
    assert np.array_equal(found.ids, again.ids)


def test_corrected_normaliser_is_unbiased_and_plain_one_is_not() -> None:
    random = np.random.default_rng(0)
    num_clusters, exponentials = 2_000, np.exp(random.normal(size=2_000))
    stored = random.choice(num_clusters, (8, 16), replace=False)  # the first four of each are active
    full = exponentials.sum()
    corrected, plain = [], []
    for seed in range(300):
        found = draw_candidates(stored, num_clusters, ratio=0.1, minimum=0, seed=seed)
        assert len(found.ids) == 8 * 4 + 200
        corrected.append((np.exp(found.log_correction_S) * exponentials[found.ids]).sum())
        plain.append(exponentials[found.ids].sum())
    assert np.array_equal(
        draw_candidates(stored, num_clusters, ratio=0, minimum=0, seed=0).ids, np.sort(stored, axis=None)
    )
    without = draw_candidates(stored, num_clusters, ratio=0.1, minimum=0, seed=0, corrected=False)
    assert set(stored.ravel()) <= set(without.ids[: stored.size]), "else nothing would stand for the rest of the target"
    assert not without.log_correction_S.any()
    error = np.std(corrected) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected) - full) < 4 * error
    assert np.mean(plain) < 0.2 * full


@pytest.mark.parametrize("name", LOSSES)
def test_entry_is_complete(name: str) -> None:
    entry = LOSSES[name]
    assert entry.name == name
    assert entry.summary
    assert entry.summary[-1] != "."  # help pages join summaries into lists
    function = load_loss(name)
    assert "Source: " in (inspect.getdoc(function) or "")
    learned = {"scale": entry.scale is not None, "fusion": entry.fuses}
    learned |= {name: name in entry.sample_inputs for name in SAMPLE_INPUTS}
    assert list(inspect.signature(function).parameters) == [
        "batch",
        *(part for part, is_own in learned.items() if is_own),
    ]
    assert entry.needs_teacher or (entry.space == "own" and CLUSTERS not in entry.reads and entry.one_tower)
    assert [each.name for each in LOSSES.values() if each.function == entry.function] == [name]


@pytest.mark.parametrize("mistyped", [{"reads": frozenset({"tokns"})}, {"sample_inputs": ("widht",)}])
def test_an_entry_reads_only_what_there_is(mistyped: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the loss mine reads what there is not: (tokns|widht)"):
        LossEntry("mine", "a mistyped entry", "contrastive:clip", **mistyped)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_losses_and_is_led_by_its_teacher_if_it_has_one(preset: str) -> None:
    losses = PRESETS[preset]
    assert list(select_losses(losses, {})) == [name for name in LOSSES if name in losses]
    has_teacher = any(LOSSES[name].needs_teacher for name in losses)
    for optimizer in OPTIMIZERS:
        assert (
            default_rate([LOSSES[each] for each in losses], optimizer, 64, 96)[0] > RATES[optimizer]["captions"]
        ) == has_teacher


def test_overrides_change_a_preset() -> None:
    chosen = select_losses(PRESETS["clip-kd"], {"crd": 0.5, "icl": 0.0, "affinity": 2.0})
    assert list(chosen) == ["clip", "fd", "crd", "affinity"]
    assert chosen["crd"].at(10) == 0.5
    assert chosen["fd"].at(500) == 4.0


def test_only_the_default_can_do_without_features() -> None:
    default, typed = (DistillSettings(student="student.json", loss=losses) for losses in ((), ("fd=3",)))
    assert {loss.name: weight.value for loss, weight in default.losses_near_chance.items()} == {
        "clip": 1,
        "instance": 1,
    }
    near_chance = default.losses_near_chance
    assert not any(loss.reads or loss.needs_bias for loss in near_chance), "the student is loaded before it is known"
    assert typed.losses_near_chance[LOSSES["fd"]].at(500) == 3.0
    kept = DistillSettings(student="student.json", preset="clip-kd")
    assert kept.losses_near_chance == kept.losses == default.losses


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
    assert default_rate([LOSSES[each] for each in losses], optimizer, batch_size, width)[0] == expected
    lr, reason = default_rate([LOSSES[each] for each in losses], optimizer, batch_size, width, trained=True)
    assert lr == pytest.approx(expected / 10, rel=0.05)  # of two digits
    assert reason.endswith("; 0.1 of that, since the student starts from trained weights")


def test_the_reason_says_which_part_of_the_rule_decides() -> None:
    assert default_rate([LOSSES["clip"]], "muon", 64, 96)[1] == "losses led by captions: 0.003 x sqrt(batch size/64)"
    assert default_rate([LOSSES["fd"]], "adamw", 256, 512)[1] == (
        "losses led by a teacher's features: 0.006 x sqrt(batch size/64), "
        "at most 0.576/512 for an embedding of 512 dimensions"
    )
