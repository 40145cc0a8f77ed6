"""Every loss against a float64 formula written with NumPy alone: value, gradient, shares of rows, blocks, one tower."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_data import SCALE, TEACHER_BIAS, B, compute, formula, make_batch, make_numbers, slopes, unit, with_gradients

from clipcid_cli.algorithms.losses import batch as batch_module
from clipcid_cli.algorithms.losses.batch import ClusterTargets, LossBatch
from clipcid_cli.algorithms.losses.registry import LOSSES, load_loss
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace

NAMES = tuple(LOSSES)
ONE_TOWER = [name for name in NAMES if LOSSES[name].needs_teacher and LOSSES[name].one_tower]
SCALES = torch.tensor(SCALE, dtype=torch.float64)
ALL, SOME = slice(None), slice(2, 5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", [ALL, SOME])
def test_gradient_is_the_slope_of_the_formula_in_small_blocks_too(
    name: str, own: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets that a loss holds are held by the slope."""
    if own == SOME:
        monkeypatch.setattr(batch_module, "BLOCK_ENTRIES", 2 * B)
    numbers = make_numbers()
    _, gradients = with_gradients(name, make_batch(numbers, own=own))
    for gradient, slope in zip(gradients, slopes(name, numbers, own), strict=True):
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-8)
    assert abs(gradients[0]).sum() > 0


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, B - 1), st.integers(1, B), st.integers(1, 30 * B))
def test_share_of_any_rows_in_any_blocks_equals_its_formula(name: str, first: int, count: int, entries: int) -> None:
    numbers, own = make_numbers(), slice(first, min(B, first + count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "BLOCK_ENTRIES", entries)
        share = float(compute(name, make_batch(numbers, cluster_towers="sv", own=own), SCALES))
    assert share == pytest.approx(formula(name, numbers, own, cluster_towers="sv"), rel=1e-12)


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
    parameters = LossParameters(["afd"], 5, SharedSpace(5), seed=0).double()
    assert sum(p.numel() for p in parameters.parameters()) == 2 * 5 * (10 + 1) + 1

    def gradients(own: slice) -> list[torch.Tensor]:
        value = load_loss("afd")(make_batch(make_numbers(), own=own), **parameters.of("afd"))
        return list(torch.autograd.grad(value, list(parameters.parameters())))

    for whole, *parts in zip(gradients(ALL), gradients(slice(0, 3)), gradients(slice(3, B)), strict=True):
        assert whole.abs().sum() > 0
        torch.testing.assert_close(sum(parts), whole)
