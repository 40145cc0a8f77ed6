"""Logistic regression by L-BFGS, with two savings: a diagonal estimate of the Hessian, and line searches without products.

Shape letters: N images, D width, C classes.

The function is F(θ) = mean_i ℓ(W·x_i + b, y_i) + decay/2·‖W‖² with θ = [W, b] of shape [C, D + 1]. ℓ is the cross-entropy of
the softmax where each image has one class, and the sum of C binary cross-entropies where it may have any number: then F is
a sum of C functions, each of its own row of θ.

- **Diagonal.** In coordinates in which the features are centred and uncorrelated the Hessian is nearly diagonal: along
  axis j of class k it is about κ_k·s_j + decay, with s_j the variance of axis j and κ_k the mean of p·(1 − p). L-BFGS
  begins its product from the inverse of that diagonal instead of a multiple of the identity.
- **Line search.** Logits are linear along a direction, so the product of features and direction is made once, and a trial
  step costs a softmax and no matrix product. F is convex, so the slope along the direction alone decides whether a step
  is accepted: the approximate Wolfe conditions of Hager and Zhang (2005), which also hold where F no longer changes in
  its last digits.
- **End.** A small gradient norm means little where regularisation is weak, because F is then small and flat. So the decrease
  that the next step promises, half the slope along its direction, must also be small relative to F. [O]
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import torch

PROMISED_DECREASE = 1e-5
"""Largest decrease, as a share of F, that the next step may still promise at the end."""

_HISTORY = 10
_MAX_TRIALS = 25
# Hager and Zhang's δ and σ: the share of the slope by which F must decrease, and how flat it must be at the end of a step.
_DECREASE, _CURVATURE = 0.1, 0.9
# Lower bound of p·(1 − p) for a perfectly separated class: keeps the diagonal away from 0 where decay is tiny.
_MIN_SPREAD = 1e-6


@dataclasses.dataclass(frozen=True)
class Regression(ABC):
    """The function to minimise.

    Attributes:
        features_ND: Centred, uncorrelated features, float [N, D].
        variance_D: Variance of each axis, [D].
        decay: Strength of the regularisation of the weights.
    """

    features_ND: torch.Tensor
    variance_D: torch.Tensor
    decay: float

    @abstractmethod
    def probabilities(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """Return p(class | image), a new [N, C]."""

    @abstractmethod
    def loss(self, logits_NC: torch.Tensor) -> float:
        """Return the mean over the images of ℓ."""

    @abstractmethod
    def subtract_targets(self, probabilities_NC: torch.Tensor) -> None:
        """Turn probabilities into the gradient of ℓ by the logits, in place."""

    @abstractmethod
    def mean_of_targets(self, values_NC: torch.Tensor) -> float:
        """Return the mean over the images of the sum of the values at their own classes."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of everything."""
        return self.features_ND.dtype

    def logits(self, parameters: torch.Tensor) -> torch.Tensor:
        """Return W·x + b, [N, C]."""
        return torch.addmm(parameters[:, -1], self.features_ND, parameters[:, :-1].T)

    def value(self, parameters: torch.Tensor, logits_NC: torch.Tensor) -> float:
        """Return F from the logits at the parameters."""
        return self.loss(logits_NC) + self.decay / 2 * float(parameters[:, :-1].square().sum())

    def evaluate(self, parameters: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return F and its gradient [C, D + 1]."""
        logits_NC = self.logits(parameters)
        return self.value(parameters, logits_NC), self.gradient(parameters, self.probabilities(logits_NC))

    def gradient(self, parameters: torch.Tensor, probabilities_NC: torch.Tensor) -> torch.Tensor:
        """Return F's gradient [C, D + 1] from the probabilities at the parameters, which are overwritten."""
        residuals_NC = probabilities_NC
        self.subtract_targets(residuals_NC)
        residuals_NC /= len(self.features_ND)
        weights_CD = torch.addmm(parameters[:, :-1], residuals_NC.T, self.features_ND, beta=self.decay)
        return torch.cat([weights_CD, residuals_NC.sum(dim=0)[:, None]], dim=1)

    def diagonal(self, probabilities_NC: torch.Tensor) -> torch.Tensor:
        """Estimate the Hessian's diagonal, [C, D + 1]."""
        spread_C = (probabilities_NC * (1 - probabilities_NC)).mean(dim=0).clamp(min=_MIN_SPREAD)
        weights_CD = torch.outer(spread_C, self.variance_D) + self.decay
        return torch.cat([weights_CD, spread_C[:, None]], dim=1)


@dataclasses.dataclass(frozen=True)
class SoftmaxRegression(Regression):
    """One class for each image.

    Attributes:
        labels_N: Classes, int64 [N], each of 0 … C − 1 at least once.
    """

    labels_N: torch.Tensor

    def probabilities(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """Return the softmax."""
        return logits_NC.softmax(dim=1)

    def loss(self, logits_NC: torch.Tensor) -> float:
        """Return the mean cross-entropy."""
        return float(torch.nn.functional.cross_entropy(logits_NC, self.labels_N))

    def subtract_targets(self, probabilities_NC: torch.Tensor) -> None:
        """Subtract 1 at each image's class."""
        probabilities_NC[torch.arange(len(self.labels_N), device=self.labels_N.device), self.labels_N] -= 1

    def mean_of_targets(self, values_NC: torch.Tensor) -> float:
        """Return the mean of the values at the images' classes."""
        return float(values_NC.gather(1, self.labels_N[:, None]).double().mean())


@dataclasses.dataclass(frozen=True)
class SigmoidRegressions(Regression):
    """Any number of classes for each image: one logistic regression for each class, solved together.

    Attributes:
        targets_NC: 1 where the image has the class, else 0, in the precision of the features [N, C].
    """

    targets_NC: torch.Tensor

    def probabilities(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """Return the logistic function."""
        return logits_NC.sigmoid()

    def loss(self, logits_NC: torch.Tensor) -> float:
        """Return the mean over the images of the sum of binary cross-entropies."""
        total = torch.nn.functional.binary_cross_entropy_with_logits(logits_NC, self.targets_NC, reduction="sum")
        return float(total) / len(logits_NC)

    def subtract_targets(self, probabilities_NC: torch.Tensor) -> None:
        """Subtract the targets."""
        probabilities_NC -= self.targets_NC

    def mean_of_targets(self, values_NC: torch.Tensor) -> float:
        """Return the mean of the sum of the values at the images' classes."""
        return float((values_NC * self.targets_NC).sum(dim=1).double().mean())


@dataclasses.dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        parameters: [C, D + 1].
        met: Whether the gradient and the promised decrease are small enough; False where the iterations ran out, or
            rounding left no direction of descent.
    """

    parameters: torch.Tensor
    iterations: int
    met: bool


def minimise(
    problem: Regression,
    start: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    norm: Callable[[torch.Tensor], float],
) -> Minimum:
    """Minimise by L-BFGS.

    Args:
        start: Initial parameters, [C, D + 1].
        tolerance: Ends when the norm of the gradient is at most this, and the promised decrease of F at most
            `PROMISED_DECREASE` of it.
        max_iterations: Ends after this many iterations.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.4; differences as in the module's docstring.
    """
    parameters, logits_NC = start.clone(), problem.logits(start)
    probabilities_NC = problem.probabilities(logits_NC)
    diagonal = problem.diagonal(probabilities_NC)
    gradient = problem.gradient(parameters, probabilities_NC)
    history: deque[tuple[torch.Tensor, torch.Tensor, float]] = deque(maxlen=_HISTORY)
    for iteration in range(max_iterations):
        direction = _direction(gradient, diagonal, history)
        slope = float((direction.double() * gradient.double()).sum())
        if norm(gradient) <= tolerance and -slope / 2 <= PROMISED_DECREASE * problem.value(parameters, logits_NC):
            return Minimum(parameters, iteration, met=True)
        found = _search_line(problem, parameters, direction, logits_NC, slope) if slope < 0 else None
        if found is None:
            return Minimum(parameters, iteration, met=False)
        step, logits_NC, probabilities_NC = found
        change = step * direction
        parameters = parameters + change
        new_gradient = problem.gradient(parameters, probabilities_NC)
        difference = new_gradient - gradient
        curvature = float((change.double() * difference.double()).sum())
        if curvature > 0:
            history.append((change, difference, curvature))
        gradient = new_gradient
    return Minimum(parameters, max_iterations, met=False)


def _direction(
    gradient: torch.Tensor, diagonal: torch.Tensor, history: deque[tuple[torch.Tensor, torch.Tensor, float]]
) -> torch.Tensor:
    """Return −H·gradient by the two-loop recursion."""
    direction = -gradient
    weights: list[float] = []
    for change, difference, curvature in reversed(history):
        weights.append(float((change * direction).sum()) / curvature)
        direction = direction - weights[-1] * difference
    direction = direction / diagonal
    if history:
        _, difference, curvature = history[-1]
        direction = direction * (curvature / float((difference.square() / diagonal).sum()))
    for (change, difference, curvature), weight in zip(history, reversed(weights), strict=True):
        direction = direction + (weight - float((difference * direction).sum()) / curvature) * change
    return direction


def _search_line(
    problem: Regression, parameters: torch.Tensor, direction: torch.Tensor, logits_NC: torch.Tensor, slope: float
) -> tuple[float, torch.Tensor, torch.Tensor] | None:
    """Find a step along a direction of descent.

    Returns:
        The step, and the logits and probabilities at its end; None when rounding leaves no step that decreases F.
    """
    change_NC = problem.logits(direction)
    own = problem.mean_of_targets(change_NC)
    weights, step_weights = parameters[:, :-1].double(), direction[:, :-1].double()
    linear = problem.decay * float((weights * step_weights).sum())
    quadratic = problem.decay * float(step_weights.square().sum())
    low, low_slope, high, high_slope = 0.0, slope, float("inf"), 0.0
    step = 1.0
    for _ in range(_MAX_TRIALS):
        moved_NC = torch.add(logits_NC, change_NC, alpha=step)
        probabilities_NC = problem.probabilities(moved_NC)
        expected = float((probabilities_NC * change_NC).sum(dim=1).double().mean())
        end_slope = expected - own + linear + step * quadratic
        if _CURVATURE * slope <= end_slope <= (2 * _DECREASE - 1) * slope:
            return step, moved_NC, probabilities_NC
        if end_slope < 0:
            low, low_slope = step, end_slope
        else:
            high, high_slope = step, end_slope
        if high == float("inf"):
            step *= 4
        else:
            # Where the line between the two slopes crosses zero, kept away from both ends.
            share = -low_slope / (high_slope - low_slope)
            step = low + min(max(share, 0.05), 0.95) * (high - low)
    return None
