"""The linear probe against scikit-learn, and what it promises of splits, sweeps and absent classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clipcid_cli.algorithms.probe import (
    ProbeProblem,
    SweepPoint,
    choose_point,
    regularisation_grid,
    split_by_class,
    sweep_regularisation,
)
from clipcid_cli.algorithms.softmax_regression import SoftmaxRegression


def make_data(
    num_images: int = 400, width: int = 24, num_classes: int = 6, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of unequal variance around class centres, off the origin, unit rows as CLIP's are."""
    random = np.random.default_rng(seed)
    shape = np.random.default_rng(1)
    labels = random.integers(0, num_classes, num_images)
    centres = shape.normal(size=(num_classes, width))
    mixing = shape.normal(size=(width, width)) * np.exp(-3 * np.arange(width) / width)
    rows = (0.5 * centres[labels] + random.normal(size=(num_images, width))) @ mixing + shape.normal(size=width)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(labels)


def objective(
    features: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, c: float
) -> float:
    loss = torch.nn.functional.cross_entropy(features.double() @ weights.T + bias, labels)
    return float(loss + weights.square().sum() / (2 * c * len(labels)))


@pytest.mark.parametrize("c", [0.1, 1.0, 10.0, 1000.0])
def test_objective_and_accuracy_are_scikit_learns(c: float) -> None:
    features, labels = make_data()
    found = ProbeProblem(features, labels, 6).fit(c)
    theirs = LogisticRegression(C=c, tol=1e-6, max_iter=5000).fit(features.double().numpy(), labels.numpy())
    weights, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
    assert found.converged
    assert found.objective == pytest.approx(objective(features, labels, weights, bias, c), rel=1e-4)
    test_features, test_labels = make_data(seed=5)
    mine = found.classifier.logits(test_features).argmax(dim=1)
    accuracy = float((mine == test_labels).double().mean())
    assert accuracy == pytest.approx(theirs.score(test_features.double().numpy(), test_labels.numpy()), abs=1e-3)


def test_the_stated_gradient_norm_is_that_of_the_objective() -> None:
    features, labels = make_data()
    found = ProbeProblem(features, labels, 6).fit(10.0, tolerance=1e-8)
    weights = found.classifier.weights_CD.clone().requires_grad_()
    bias = found.classifier.bias_C.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(features.double() @ weights.T + bias, labels)
    (loss + weights.square().sum() / (2 * 10.0 * len(labels))).backward()
    assert weights.grad is not None
    assert bias.grad is not None
    largest = max(float(weights.grad.abs().max()), float(bias.grad.abs().max()))
    assert largest <= 1e-8
    assert found.gradient_norm == pytest.approx(largest, rel=1e-3, abs=1e-12)
    assert found.objective == pytest.approx(
        objective(features, labels, weights.detach(), bias.detach(), 10.0), rel=1e-12
    )


def test_gradient_and_diagonal_follow_from_the_function() -> None:
    features, labels = make_data(60, 4, 3)
    centred = features.double() - features.double().mean(dim=0)
    problem = SoftmaxRegression(centred, labels, centred.square().mean(dim=0), 0.01)
    parameters = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(flat: torch.Tensor) -> torch.Tensor:
        theta = flat.view(3, 5)
        loss = torch.nn.functional.cross_entropy(problem.logits(theta), labels)
        return loss + 0.005 * theta[:, :-1].square().sum()

    expected = torch.autograd.functional.jacobian(value, parameters.flatten())
    torch.testing.assert_close(problem.evaluate(parameters)[1].flatten(), expected)
    at_zero = problem.diagonal(problem.logits(torch.zeros(3, 5, dtype=torch.float64)).softmax(dim=1))
    hessian = torch.autograd.functional.hessian(value, torch.zeros(15, dtype=torch.float64))
    torch.testing.assert_close(at_zero.flatten(), hessian.diagonal())


def test_a_warm_start_finds_the_same() -> None:
    features, labels = make_data()
    problem = ProbeProblem(features, labels, 6)
    cold = problem.fit(10.0)
    warm = problem.fit(10.0, problem.fit(6.0).classifier)
    assert warm.objective == pytest.approx(cold.objective, rel=1e-6)
    assert problem.fit(10.0, cold.classifier).iterations == 0


def test_separable_data_is_solved_too() -> None:
    features = torch.eye(8).repeat(3, 1) + 0.01 * torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    found = ProbeProblem(features, torch.arange(8).repeat(3), 8).fit(1e5)
    assert found.converged
    assert torch.equal(found.classifier.logits(features).argmax(dim=1), torch.arange(8).repeat(3))


def test_a_class_without_images_is_never_predicted() -> None:
    features, labels = make_data(num_classes=3)
    found = ProbeProblem(features, labels * 2, 6).fit(1.0)
    logits = found.classifier.logits(features)
    assert set(logits.argmax(dim=1).tolist()) <= {0, 2, 4}
    assert torch.isneginf(logits[:, [1, 3, 5]]).all()
    few = ProbeProblem(features, labels, 3).fit(1.0)
    assert found.objective == pytest.approx(few.objective, rel=1e-9)


def test_one_class_alone_is_always_right() -> None:
    features, _ = make_data(20)
    found = ProbeProblem(features, torch.full((20,), 4), 6).fit(1.0)
    assert found.converged
    assert found.classifier.logits(features).argmax(dim=1).tolist() == [4] * 20


def test_the_sweep_fits_every_value_and_the_best_is_the_simplest_of_equals() -> None:
    features, labels = make_data()
    validation = make_data(seed=7)
    grid = regularisation_grid(45)
    problem = ProbeProblem(features, labels, 6)
    points = sweep_regularisation(problem, *validation, grid)
    assert [point.c for point in points] == grid
    assert all(point.solution.converged for point in points)
    for point in points[::11]:
        assert point.solution.objective == pytest.approx(problem.fit(point.c).objective, rel=1e-4)
    best = choose_point(points)
    assert sum(point.solution.iterations for point in points) < sum(problem.fit(c).iterations for c in grid)
    assert best.accuracy == max(point.accuracy for point in points)
    tied = [SweepPoint(c, 0.5, points[0].solution) for c in (1.0, 10.0)]
    assert choose_point(tied).c == 1.0


def test_the_grid_is_the_protocols() -> None:
    grid = regularisation_grid()
    assert len(grid) == 45
    assert grid[0] == pytest.approx(1e-6)
    assert grid[-1] == pytest.approx(1e5)
    np.testing.assert_allclose(np.diff(np.log10(grid)), 0.25)


def test_every_class_is_on_both_sides_of_the_split() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 2 + [3])
    chosen = split_by_class(labels, 0.2, seed=3)
    counts = [int(chosen[labels == label].sum()) for label in range(4)]
    assert counts == [10, 1, 1, 0]
    assert torch.equal(chosen, split_by_class(labels, 0.2, seed=3))
    assert not torch.equal(chosen, split_by_class(labels, 0.2, seed=4))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.tensor([0, 1, 2]), r"labels \[3\] do not fit"), (torch.tensor([0, 5]), r"classes in \[0, 2\]")],
)
def test_wrong_arguments_are_named(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeProblem(torch.ones(2, 4), labels, 3)
