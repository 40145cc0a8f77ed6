"""Every loss against a float64 formula written with NumPy alone: value, gradient, shares of rows, blocks, one tower."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_data import (
    SCALE,
    STUDENT_SCALE,
    TEACHER_SCALE,
    B,
    compute,
    formula,
    log_softmax,
    make_batch,
    make_numbers,
    slopes,
    student_rows,
    unit,
    with_gradients,
)

from clipcid_cli.algorithms.losses import batch as batch_module
from clipcid_cli.algorithms.losses.batch import LossBatch
from clipcid_cli.algorithms.losses.cluster import ClusterTargets
from clipcid_cli.algorithms.losses.registry import LOSSES, load_loss
from clipcid_cli.algorithms.losses.shared_space import LossParameters, SharedSpace

NAMES = tuple(LOSSES)
ONE_TOWER = [name for name in NAMES if LOSSES[name].needs_teacher and LOSSES[name].one_tower]
# Their gradient is not that of their value: part of it is a target that is held.
FIXED_TARGETS = ("vrd", "xrd")
# They take the student's scale as a constant.
HELD_SCALE = ("gd",)
SCALES = torch.tensor(SCALE, dtype=torch.float64)
ALL, SOME = slice(None), slice(2, 5)


@pytest.mark.parametrize("name", NAMES)
def test_equals_its_formula(name: str) -> None:
    numbers = make_numbers()
    assert float(compute(name, make_batch(numbers), SCALES)) == pytest.approx(formula(name, numbers), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("own", [ALL, SOME])
def test_gradient_is_the_slope_of_the_formula(name: str, own: slice) -> None:
    numbers = make_numbers()
    _, gradients = with_gradients(name, make_batch(numbers, own=own))
    for gradient, slope in zip(gradients, slopes(name, numbers, own), strict=True):
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-8)
    assert abs(gradients[0]).sum() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FIXED_TARGETS])
@pytest.mark.parametrize("own", [ALL, SOME])
def test_gradient_passes_gradcheck(name: str, own: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "BLOCK_ENTRIES", 2 * B)
    batch = make_batch(make_numbers(), own=own)

    def loss(s: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, student_scale: torch.Tensor) -> torch.Tensor:
        rows = student_rows(s, v, own)
        return compute(name, dataclasses.replace(batch, student_scale=student_scale, **rows), scale)

    inputs = [
        tensor.clone().requires_grad_() for tensor in (batch.image_Bd, batch.text_Bd, SCALES, batch.student_scale)
    ]
    inputs[3].requires_grad_(name not in HELD_SCALE)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, B - 1), st.integers(1, B), st.integers(1, 30 * B))
def test_share_of_any_rows_in_any_blocks_equals_its_formula(name: str, first: int, count: int, entries: int) -> None:
    numbers, own = make_numbers(), slice(first, min(B, first + count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "BLOCK_ENTRIES", entries)
        share = float(compute(name, make_batch(numbers, cluster_towers="sv", own=own), SCALES))
    assert share == pytest.approx(formula(name, numbers, own, cluster_towers="sv"), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [[0, 3, B], [0, 2, 5, B]])
def test_shares_and_their_gradients_add_up_to_the_whole(name: str, parts: list[int]) -> None:
    numbers = make_numbers()
    whole, whole_gradients = with_gradients(name, make_batch(numbers))
    shares = [
        with_gradients(name, make_batch(numbers, own=slice(first, last))) for first, last in itertools.pairwise(parts)
    ]
    assert sum(share for share, _ in shares) == pytest.approx(whole, rel=1e-13)
    for place, expected in enumerate(whole_gradients):
        np.testing.assert_allclose(sum(gradients[place] for _, gradients in shares), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("entries", [1, 3 * B, 4 * B])
def test_blocks_give_what_one_matrix_gives(name: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(make_numbers(), cluster_towers="sv")
    plain, plain_gradients = with_gradients(name, batch)
    monkeypatch.setattr(batch_module, "BLOCK_ENTRIES", entries)
    value, gradients = with_gradients(name, batch)
    assert value == pytest.approx(plain, rel=1e-13)
    for gradient, expected in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-13)


def test_large_batch_keeps_no_matrix_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 3_000
    assert rows**2 > batch_module.BLOCK_ENTRIES
    random = np.random.default_rng(0)
    image, text = (torch.from_numpy(unit(random.normal(size=(rows, 4))).astype(np.float32)) for _ in range(2))
    image.requires_grad_()

    def largest_kept() -> int:
        kept = [0]
        batch = LossBatch(image, text, torch.tensor(1.0), image, text)
        with torch.autograd.graph.saved_tensors_hooks(lambda kept_tensor: keep(kept, kept_tensor), lambda x: x):
            compute("clip", batch, SCALES).backward()
        return max(kept)

    assert largest_kept() < rows**2
    monkeypatch.setattr(batch_module, "BLOCK_ENTRIES", rows**2)
    assert largest_kept() == rows**2


def test_large_blocks_of_a_gpu_keep_no_matrix_either(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, num_centroids = 1_024, 9_000
    random = np.random.default_rng(0)
    image, text, centroids = (
        torch.from_numpy(unit(random.normal(size=(count, 4))).astype(np.float32))
        for count in (rows, rows, num_centroids)
    )
    nearest = torch.arange(rows)[:, None]
    targets = ClusterTargets(centroids, torch.zeros(num_centroids), nearest, torch.ones(rows, 1))
    image.requires_grad_()
    batch = LossBatch(image, text, torch.tensor(1.0), image, text, image_clusters=targets)

    def sum_and_num_kept(name: str) -> tuple[float, int]:
        kept = list[int]()
        with torch.autograd.graph.saved_tensors_hooks(lambda kept_tensor: keep(kept, kept_tensor), lambda x: x):
            value = compute(name, batch, SCALES.float())
        (gradient,) = torch.autograd.grad(value, image)
        return float(gradient.abs().sum()), sum(kept)

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "BLOCK_ENTRIES", rows * num_centroids)
        plain = {name: sum_and_num_kept(name) for name in ("clip", "cluster")}
    monkeypatch.setattr(batch_module, "block_entries", lambda _: 1 << 28)
    monkeypatch.setattr(batch_module, "BLOCK_ENTRIES", rows**2 - 1)
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


def keep(kept: list[int], tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("name", ONE_TOWER)
@pytest.mark.parametrize("tower", ["t", "u"])
def test_one_tower_leaves_its_half(name: str, tower: str) -> None:
    numbers = make_numbers()
    student = {"t": "s", "u": "v"}[tower]
    batch = make_batch(numbers, towers=tower, cluster_towers=student)
    expected = formula(name, numbers, towers=tower, cluster_towers=student)
    assert float(compute(name, batch, SCALES)) == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(formula(name, numbers, cluster_towers="sv"), rel=1e-3)


@pytest.mark.parametrize("towers", ["s", "v", "sv"])
def test_cluster_loss_of_both_towers_is_their_mean(towers: str) -> None:
    numbers = make_numbers()
    value = compute("cluster", make_batch(numbers, cluster_towers=towers), SCALES)
    assert float(value) == pytest.approx(formula("cluster", numbers, cluster_towers=towers), rel=1e-12)


@pytest.mark.parametrize("name", FIXED_TARGETS)
def test_fixed_targets_are_held(name: str) -> None:
    """A slope that moves the targets too is another than the loss's gradient."""
    numbers = make_numbers()
    _, gradients = with_gradients(name, make_batch(numbers))
    moved = numbers | {"v": numbers["v"].copy()}
    moved["v"][0, 0] += 1e-6
    slope = (formula(name, moved) - formula(name, numbers)) / 1e-6
    assert slope != pytest.approx(gradients[1][0, 0], rel=1e-3)


def test_gradient_distance_compares_the_gradients_of_the_contrastive_loss() -> None:
    """With a teacher that is flat, what is left is the squared gradient of `clip` itself, as autograd finds it."""
    numbers = make_numbers()
    batch = dataclasses.replace(make_batch(numbers), teacher_scale=0.0)
    _, (by_image, by_text, *_) = with_gradients("clip", batch)
    expected = float((by_image**2).sum() + (by_text**2).sum()) * B
    assert float(compute("gd", batch, SCALES)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["clip", "instance", "icl"])
def test_equal_captions_match_without_targets_of_their_own(name: str) -> None:
    """Targets uniform over equal captions would change nothing: their rows are equal, and so are the logits."""
    numbers, caption = make_numbers(), np.array([0, 1, 0, 2, 1, 0, 3])
    numbers |= {side: numbers[side][caption] for side in "vu"}
    pairs = [("s", "v")] if name == "clip" else [("s", "u"), ("v", "t")]
    ways = pairs if name == "icl" else [*pairs, *((right, left) for left, right in pairs)]
    scale = STUDENT_SCALE if name == "clip" else SCALE
    losses = []
    for left, right in ways:
        for query, row in enumerate(numbers[left]):
            losses.append(-log_softmax(scale * numbers[right] @ row)[caption == caption[query]].mean())
    assert float(compute(name, make_batch(numbers), SCALES)) == pytest.approx(np.mean(losses), rel=1e-12)


def test_fusion_layers_learn_from_any_share_of_rows() -> None:
    parameters = LossParameters(["afd"], 5, SharedSpace(5), seed=0).double()
    assert sum(p.numel() for p in parameters.parameters()) == 2 * 5 * (10 + 1) + 1

    def gradients(own: slice) -> list[torch.Tensor]:
        value = load_loss("afd")(make_batch(make_numbers(), own=own), **parameters.of("afd"))
        return list(torch.autograd.grad(value, list(parameters.parameters())))

    for whole, *parts in zip(gradients(ALL), gradients(slice(0, 3)), gradients(slice(3, B)), strict=True):
        assert whole.abs().sum() > 0
        torch.testing.assert_close(sum(parts), whole)


def test_losses_vanish_where_student_equals_teacher() -> None:
    numbers = make_numbers()
    batch = make_batch(numbers | {"s": numbers["t"], "v": numbers["u"], "student_scale": np.array(TEACHER_SCALE)})
    assert float(compute("fd", batch, SCALES)) == 0
    assert float(compute("crd", batch, SCALES)) == pytest.approx(0, abs=1e-12)
    assert float(compute("gd", batch, SCALES)) == pytest.approx(0, abs=1e-12)


def test_cross_relation_vanishes_where_both_modalities_agree() -> None:
    numbers = make_numbers()
    batch = make_batch(numbers | {"v": numbers["s"], "u": numbers["t"]})
    assert float(compute("xrd", batch, SCALES)) == pytest.approx(0, abs=1e-12)
    assert float(compute("xrd", make_batch(numbers), SCALES)) > 0.1
    assert float(make_batch(numbers).student_scale) == STUDENT_SCALE
