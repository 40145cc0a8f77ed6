"""Linear probe: logistic regression on frozen features, solved to a stated gradient norm.

Shape letters: N images, D width, C classes.

The problem is scikit-learn's ``LogisticRegression(C=c)``: minimise over weights W [C, D] and intercepts b [C]

    F(W, b) = mean_i ℓ(W·x_i + b, y_i) + ‖W‖² / (2·c·N)

(scikit-learn's objective divided by c·N; the intercepts are not regularised). ℓ is the cross-entropy of the softmax. Of two
classes scikit-learn fits one weight vector w in place of W = [−w/2, w/2], whose penalty in W is ‖W‖²/(c·N); so do we. Where
images may have several classes, ℓ is the sum of a binary cross-entropy for each class: C problems of scikit-learn's in one.

Features are centred and rotated onto their principal axes, which changes neither the penalty nor the optimum (the intercepts
absorb the shift, and N images vary along at most N − 1 axes) and makes the Hessian nearly diagonal, as
:mod:`clipcid_cli.algorithms.probe.logistic_regression` needs it. Iterations run in float32; the gradient at the end is
computed in float64, and where it exceeds the tolerance float64 iterations follow. [O]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from clipcid_cli.algorithms.probe.logistic_regression import Regression, SigmoidRegressions, SoftmaxRegression, minimise

TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier.

    Attributes:
        weights_CD: float64 [C, D].
        bias_C: float64 [C]; −∞ for a class without a training image, which is never predicted. Where images have several
            classes, +∞ for one that every training image has.
    """

    weights_CD: torch.Tensor
    bias_C: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Solution:
    """The result of a fit.

    Attributes:
        objective: F at the classifier, computed in float64.
        gradient_norm: Largest entry of F's gradient there, in the given coordinates, computed in float64.
        converged: Whether the gradient norm is within the tolerance, and the next step promises to decrease F by at
            most 1e-5 of it.
    """

    classifier: LinearClassifier
    objective: float
    gradient_norm: float
    iterations: int
    converged: bool


def regularisation_grid(count: int = 45, low: float = 1e-6, high: float = 1e5) -> list[float]:
    """Return the values of C that are tried, evenly spaced in their logarithm.

    Source: DINOv2's protocol, 45 values in 1e-6 … 1e5: docs/method.md#linear-probe.
    """
    return [10.0 ** (math.log10(low) + step * math.log10(high / low) / (count - 1)) for step in range(count)]


class ProbeProblem:
    """Logistic regression on one set of features, for any number of strengths.

    Args:
        features_ND: Features, float32 [N, D]; unit rows in the protocol.
        labels: Classes, int64 [N], in [0, C); or whether an image has a class, bool [N, C].
        num_classes: C; classes without an image are never predicted.

    Raises:
        ValueError: when shapes disagree, a label names no class, or there is no image.
    """

    def __init__(self, features_ND: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
        if features_ND.ndim != 2 or len(features_ND) != len(labels) or not len(labels):
            raise ValueError(f"features {list(features_ND.shape)} and labels {list(labels.shape)} do not fit")
        self.num_classes, self._num_images = num_classes, len(labels)
        self._several = labels.ndim == 2
        bias_C = torch.full((num_classes,), -torch.inf, dtype=torch.float64, device=labels.device)
        if self._several:
            if labels.shape[1] != num_classes:
                raise ValueError(f"labels have {labels.shape[1]} columns; there are {num_classes} classes")
            images_C = labels.sum(dim=0)
            bias_C[images_C == len(labels)] = torch.inf
            self.present = ((images_C > 0) & (images_C < len(labels))).nonzero()[:, 0]
            self._targets = labels[:, self.present].double()
        else:
            if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise ValueError(f"labels are in [{labels.min()}, {labels.max()}], classes in [0, {num_classes - 1}]")
            self.present, self._targets = torch.unique(labels, return_inverse=True)
        self._unfitted_bias_C = bias_C
        exact_ND = features_ND.double()
        self._mean_D = exact_ND.mean(dim=0)
        centred_ND = exact_ND - self._mean_D
        variance_D, axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(exact_ND))
        # Eigenvalues are ascending, so the last axes are those along which N images can vary.
        kept = min(len(variance_D), len(exact_ND) - 1)
        first = len(variance_D) - kept
        self._variance_D, self._axes_DD = variance_D[first:].clamp(min=0), axes_DD[:, first:]
        self._rotated_ND = centred_ND @ self._axes_DD
        self._rotated32_ND = self._rotated_ND.float()

    def fit(
        self,
        c: float,
        start: LinearClassifier | None = None,
        tolerance: float = TOLERANCE,
        max_iterations: int = 2000,
    ) -> Solution:
        """Solve for one strength.

        Args:
            c: Inverse strength of regularisation, as scikit-learn's ``C``.
            start: Classifier to begin from, such as that of a neighbouring strength; zeros when None.
            tolerance: Largest allowed entry of the gradient of F.
            max_iterations: Largest number of iterations in each precision.

        Returns:
            The solution; ``converged`` is False when the iterations ran out.
        """
        parameters = self._rotate(start)
        if not len(self.present):
            # Every class belongs to all images or to none: there is nothing to fit.
            return Solution(self._classifier(parameters), 0.0, 0.0, 0, converged=True)
        iterations = 0
        fast, exact = self._regression(c, self._rotated32_ND), self._regression(c, self._rotated_ND)
        # A float32 gradient is trusted to half the tolerance, so that the float64 one usually passes.
        for problem, aim in ((fast, tolerance / 2), (exact, tolerance)):
            found = minimise(problem, parameters.to(problem.dtype), aim, max_iterations, self._gradient_norm)
            parameters, iterations = found.parameters.double(), iterations + found.iterations
            objective, gradient = exact.evaluate(parameters)
            norm = self._gradient_norm(gradient)
            converged = found.met and norm <= tolerance
            if converged:
                break
        return Solution(self._classifier(parameters), objective, norm, iterations, converged)

    def objective(self, c: float, classifier: LinearClassifier) -> float:
        """Return F of a classifier at one strength."""
        problem, parameters = self._regression(c, self._rotated32_ND), self._rotate(classifier).float()
        return problem.value(parameters, problem.logits(parameters))

    def _regression(self, c: float, rows_ND: torch.Tensor) -> Regression:
        """Return the function to minimise, in the precision of the rows."""
        variance_D, decay = self._variance_D.to(rows_ND.dtype), 1.0 / (c * self._num_images)
        if self._several:
            return SigmoidRegressions(rows_ND, variance_D, decay, self._targets.to(rows_ND.dtype))
        penalties = 2.0 if len(self.present) == 2 else 1.0
        return SoftmaxRegression(rows_ND, variance_D, penalties * decay, self._targets)

    def _rotate(self, start: LinearClassifier | None) -> torch.Tensor:
        """Return the parameters of a classifier in centred, rotated coordinates, intercepts last: float64 [C, D + 1]."""
        if start is None:
            shape = (len(self.present), self._rotated_ND.shape[1] + 1)
            return torch.zeros(shape, dtype=torch.float64, device=self._rotated_ND.device)
        weights_CD = start.weights_CD[self.present]
        bias_C = start.bias_C[self.present] + weights_CD @ self._mean_D
        # A class that the start was not fitted on begins with intercept 0.
        bias_C = torch.where(bias_C.isfinite(), bias_C, torch.zeros_like(bias_C))
        return torch.cat([weights_CD @ self._axes_DD, bias_C[:, None]], dim=1)

    def _classifier(self, parameters: torch.Tensor) -> LinearClassifier:
        weights_CD = parameters[:, :-1] @ self._axes_DD.T
        bias_C = parameters[:, -1] - weights_CD @ self._mean_D
        all_weights = weights_CD.new_zeros(self.num_classes, weights_CD.shape[1])
        all_bias = self._unfitted_bias_C.clone()
        all_weights[self.present], all_bias[self.present] = weights_CD, bias_C
        return LinearClassifier(all_weights, all_bias)

    def _gradient_norm(self, gradient: torch.Tensor) -> float:
        """Return the largest entry of the gradient in the coordinates of the given features."""
        gradient = gradient.double()
        weights_CD = gradient[:, :-1] @ self._axes_DD.T + torch.outer(gradient[:, -1], self._mean_D)
        return max(float(weights_CD.abs().max()), float(gradient[:, -1].abs().max()))


def sweep_regularisation(problem: ProbeProblem, grid: Sequence[float]) -> Iterator[Solution]:
    """Fit every strength, from the strongest regularisation on, starting each from those before.

    Solutions change smoothly with log C, so on an even grid the line through the last two leads close to the next: in a
    trial (2,000 images, 128 wide, 20 classes, 45 values) that took 341 iterations, and 669 from the last solution alone.

    Args:
        grid: Values of C, ascending.

    Yields:
        The solution of each value, in order.
    """
    last: list[LinearClassifier] = []
    for c in grid:
        solution = problem.fit(c, min(_starts(last), key=lambda start: problem.objective(c, start), default=None))
        last = [*last[-1:], solution.classifier]
        yield solution


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One strength of regularisation, and how well its classifier does on the validation images.

    Attributes:
        c: Inverse strength, as scikit-learn's ``C``.
        score: The metric by which a strength is chosen, in [0, 1].
    """

    c: float
    score: float
    solution: Solution


def choose_point(points: Sequence[SweepPoint]) -> SweepPoint:
    """Return the point of the highest score; of equal ones that of the strongest regularisation."""
    return max(points, key=lambda point: (point.score, -point.c))


def _starts(classifiers: Sequence[LinearClassifier]) -> list[LinearClassifier]:
    """Return initial classifiers: the last of one or two solutions, and the linear extrapolation from both."""
    if len(classifiers) < 2:
        return list(classifiers)
    before, last = classifiers
    beyond = LinearClassifier(2 * last.weights_CD - before.weights_CD, 2 * last.bias_C - before.bias_C)
    return [last, beyond]
