"""The linear probe against scikit-learn, and what it promises of sweeps, splits, two, absent and several classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from clipcid_cli.algorithms.metrics.classification import measure_scores
from clipcid_cli.algorithms.probe import (
    LinearClassifier,
    ProbeProblem,
    SweepPoint,
    choose_point,
    draw_shots,
    folds_by_class,
    regularisation_grid,
    split_by_class,
    stratum,
    sweep_regularisation,
)

NUM_IMAGES, WIDTH = 400, 24


def make_data(num_classes: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features of unequal variance around class centres, off the origin, unit rows as CLIP's are."""
    random = np.random.default_rng(seed)
    shape = np.random.default_rng(1)
    labels = random.integers(0, num_classes, NUM_IMAGES)
    centres = shape.normal(size=(num_classes, WIDTH))
    mixing = shape.normal(size=(WIDTH, WIDTH)) * np.exp(-3 * np.arange(WIDTH) / WIDTH)
    rows = (0.5 * centres[labels] + random.normal(size=(NUM_IMAGES, WIDTH))) @ mixing + shape.normal(size=WIDTH)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(labels)


def logits_of(classifier: LinearClassifier, features: torch.Tensor) -> torch.Tensor:
    return features.double() @ classifier.weights_CD.T + classifier.bias_C


def objective(
    features: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor, c: float
) -> float:
    loss = torch.nn.functional.cross_entropy(features.double() @ weights.T + bias, labels)
    return float(loss + weights.square().sum() / (2 * c * len(labels)))


@pytest.mark.parametrize("several", [False, True])
def test_the_stated_gradient_norm_is_that_of_the_objective(several: bool) -> None:
    features, labels = make_data()
    targets = several_labels(labels, 6) if several else labels
    found = ProbeProblem(features, targets, 6).fit(10.0, tolerance=1e-8)
    weights = found.classifier.weights_CD.clone().requires_grad_()
    bias = found.classifier.bias_C.clone().requires_grad_()
    logits = features.double() @ weights.T + bias
    if several:
        loss = 6 * torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.double())
    else:
        loss = torch.nn.functional.cross_entropy(logits, targets)
    value = loss + weights.square().sum() / (2 * 10.0 * len(labels))
    value.backward()
    assert weights.grad is not None
    assert bias.grad is not None
    largest = max(float(weights.grad.abs().max()), float(bias.grad.abs().max()))
    assert largest <= 1e-8
    assert found.gradient_norm == pytest.approx(largest, rel=1e-3, abs=1e-12)
    assert found.objective == pytest.approx(float(value.detach()), rel=1e-12)


def several_labels(labels: torch.Tensor, classes: int, seed: int = 0) -> torch.Tensor:
    """Give each image the class it was drawn from and sometimes another."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.rand(len(labels), classes, generator=generator) < 0.1
    return torch.nn.functional.one_hot(labels, classes).bool() | more


def their_objective(theirs: LogisticRegression, features: np.ndarray, positive: np.ndarray) -> float:
    """What scikit-learn's fit of one class comes to, as a mean over images."""
    margins = theirs.decision_function(features)
    loss = np.logaddexp(0, np.where(positive, -margins, margins)).mean()
    return float(loss + (theirs.coef_**2).sum() / (2 * theirs.C * len(positive)))


def test_two_classes_are_scikit_learns_one_weight_vector() -> None:
    features, labels = make_data(num_classes=2)
    for c in (0.1, 10.0):
        found = ProbeProblem(features, labels, 2).fit(c, tolerance=1e-8)
        theirs = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(features.double().numpy(), labels.numpy())
        weights_CD, bias_C = found.classifier.weights_CD, found.classifier.bias_C
        np.testing.assert_allclose((weights_CD[1] - weights_CD[0]).numpy(), theirs.coef_[0], rtol=1e-3, atol=1e-4)
        assert float(bias_C[1] - bias_C[0]) == pytest.approx(theirs.intercept_[0], rel=1e-3, abs=1e-4)
        expected = their_objective(theirs, features.double().numpy(), labels.numpy() == 1)
        assert found.objective == pytest.approx(expected, rel=1e-6)


def test_several_classes_are_scikit_learns_fits_of_each_class() -> None:
    features, labels = make_data()
    positive = several_labels(labels, 6)
    test_features, test_labels = make_data(seed=5)
    test_positive = several_labels(test_labels, 6, 1)
    for c in (0.1, 100.0):
        found = ProbeProblem(features, positive, 6).fit(c)
        assert found.converged
        total = 0.0
        scores = list[np.ndarray]()
        for own in positive.numpy().T:
            theirs = LogisticRegression(C=c, tol=1e-6, max_iter=5000).fit(features.double().numpy(), own)
            total += their_objective(theirs, features.double().numpy(), own)
            scores.append(theirs.decision_function(test_features.double().numpy()))
        assert found.objective == pytest.approx(total, rel=1e-4)
        metrics = measure_scores(found.classifier.scores(test_features), test_positive, 6)
        expected = average_precision_score(test_positive.numpy(), np.stack(scores, 1), average="macro")
        assert metrics["mean_average_precision"] == pytest.approx(expected, abs=1e-3)


def test_a_class_that_no_image_or_every_image_has_is_left_out_of_the_fit() -> None:
    features, labels = make_data(num_classes=3)
    positive = torch.zeros(len(labels), 5, dtype=torch.bool)
    positive[:, [0, 2, 4]] = torch.nn.functional.one_hot(labels, 3).bool()
    positive[:, 3] = True
    found = ProbeProblem(features, positive, 5).fit(1.0)
    assert torch.isneginf(logits_of(found.classifier, features)[:, 1]).all()
    assert torch.isposinf(logits_of(found.classifier, features)[:, 3]).all()
    few = ProbeProblem(features, positive[:, [0, 2, 4]], 3).fit(1.0)
    assert found.objective == pytest.approx(few.objective, rel=1e-9)
    nothing = list(sweep_regularisation(ProbeProblem(features, positive[:, [1, 3]], 2), [0.1, 1.0, 10.0]))
    assert all(solution.converged and solution.objective == 0 for solution in nothing)
    assert nothing[-1].classifier.bias_C.tolist() == [-np.inf, np.inf]


def test_a_class_without_images_is_never_predicted() -> None:
    features, labels = make_data(num_classes=3)
    found = ProbeProblem(features, labels * 2, 6).fit(1.0)
    logits = logits_of(found.classifier, features)
    assert set(logits.argmax(dim=1).tolist()) <= {0, 2, 4}
    assert torch.isneginf(logits[:, [1, 3, 5]]).all()
    few = ProbeProblem(features, labels, 3).fit(1.0)
    assert found.objective == pytest.approx(few.objective, rel=1e-9)


def test_the_sweep_solves_every_value_and_the_best_is_the_simplest_of_equals() -> None:
    features, labels = make_data()
    rows, own = make_data(seed=7)
    grid = regularisation_grid()
    problem = ProbeProblem(features, labels, 6)
    solutions = list(sweep_regularisation(problem, grid))
    np.testing.assert_allclose(np.log10(grid), np.linspace(-6, 5, 45), atol=1e-12)
    assert len(solutions) == 45
    assert all(solution.converged for solution in solutions)
    # Where regularisation is weak the gradient alone would let a fit end far from its least objective.
    for c, solution in list(zip(grid, solutions, strict=True))[::11]:
        model = LogisticRegression(C=c, solver="newton-cg", tol=1e-10, max_iter=10_000)
        tight = model.fit(features.double().numpy(), labels.numpy())
        weights, bias = torch.from_numpy(tight.coef_), torch.from_numpy(tight.intercept_)
        assert solution.objective <= objective(features, labels, weights, bias, c) * (1 + 1e-4)
    # Each begins with the one before.
    some = range(20, 45, 8)
    assert sum(solutions[place].iterations for place in some) < sum(
        problem.fit(grid[place]).iterations for place in some
    )
    points = [
        SweepPoint(c, measure_scores(solution.classifier.scores(rows), own, 6)["acc1"], (solution,))
        for c, solution in zip(grid, solutions, strict=True)
    ]
    best = choose_point(points)
    assert best.score == max(point.score for point in points)
    tied = [SweepPoint(c, 0.5, (solutions[0],)) for c in (1.0, 10.0)]
    assert choose_point(tied).c == 1.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.tensor([0, 1, 2]), r"labels \[3\] do not fit"), (torch.tensor([0, 5]), r"classes in \[0, 2\]")],
)
def test_wrong_arguments_are_named(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeProblem(torch.ones(2, 4), labels, 3)


def test_every_class_is_on_both_sides_of_the_split() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 2 + [3])
    chosen = split_by_class(labels, 0.2, seed=3)
    counts = [int(chosen[labels == label].sum()) for label in range(4)]
    assert counts == [10, 1, 1, 0]
    assert torch.equal(chosen, split_by_class(labels, 0.2, seed=3))
    assert not torch.equal(chosen, split_by_class(labels, 0.2, seed=4))
    folds = folds_by_class(labels, 5, seed=3)
    assert torch.bincount(folds[:50]).tolist() == [10] * 5
    assert torch.bincount(folds[50:55]).tolist() == [1] * 5  # small classes fill the folds in turn
    assert folds[55] == -1
    assert torch.equal(folds, folds_by_class(labels, 5, seed=3))
    assert not torch.equal(folds, folds_by_class(labels, 5, seed=4))


def test_images_with_several_classes_are_split_by_their_rarest() -> None:
    labels = torch.zeros(60, 3, dtype=torch.bool)
    labels[:50, 0] = True
    labels[:10, 1] = True
    assert stratum(labels).tolist() == [1] * 10 + [0] * 40 + [-1] * 10
    chosen = split_by_class(labels, 0.2, seed=0)
    assert [int(chosen[part].sum()) for part in (slice(0, 10), slice(10, 50), slice(50, 60))] == [2, 8, 2]


def test_shots_are_so_many_of_every_class_and_nested() -> None:
    labels = torch.tensor([0] * 20 + [1] * 3 + [3] * 9)
    draws = {shots: draw_shots(labels, shots, seed=1) for shots in (1, 4, 8)}
    for shots, drawn in draws.items():
        counts = torch.bincount(labels[drawn], minlength=4).tolist()
        assert counts == [shots, min(shots, 3), 0, shots]
        assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert set(draws[1].tolist()) < set(draws[4].tolist()) < set(draws[8].tolist())
    assert torch.equal(draws[4], draw_shots(labels, 4, seed=1))
    assert not torch.equal(draws[4], draw_shots(labels, 4, seed=2))


def test_shots_of_images_with_several_classes_give_every_class_its_number() -> None:
    labels = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)) < 0.2
    drawn = draw_shots(labels, 4, seed=0)
    assert (labels[drawn].sum(dim=0) >= 4).all()
    assert len(drawn) <= 20
