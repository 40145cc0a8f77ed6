"""What probes a model's frozen features: logistic regression, solved to a stated gradient norm, and nearest neighbours.

The problem is scikit-learn's ``LogisticRegression(C=c)``: minimise over weights W [C, D] and intercepts b [C]

    F(W, b) = mean_i ℓ(W·x_i + b, y_i) + ‖W‖² / (2·c·N)

(scikit-learn's objective divided by c·N; the intercepts are not regularised). ℓ is the cross-entropy of the softmax. Of two
classes scikit-learn fits one weight vector w in place of W = [−w/2, w/2], whose penalty in W is ‖W‖²/(c·N); so do we. Where
images may have several classes, ℓ is the sum of a binary cross-entropy for each class: C problems of scikit-learn's in one.

Features are centred and rotated onto their principal axes, which changes neither the penalty nor the optimum (the intercepts
absorb the shift, and N images vary along at most N − 1 axes). There the Hessian is nearly diagonal: along axis j of class k
it is about κ_k·s_j + 1/(c·N), with s_j the variance of the axis and κ_k the mean of p·(1 − p). L-BFGS runs in coordinates
scaled by that diagonal. A small gradient means little where regularisation is weak, because F is then small and flat: the
decrease that Newton's step by the diagonal promises must be small relative to F, too. [O]
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional

from clipcid_cli.algorithms.near.nearest import top

TOLERANCE = 1e-6
PROMISED_DECREASE = 1e-5
"""Largest decrease, as a share of F, that the next step may still promise at the end."""

_HISTORY = 10
_MAX_ITERATIONS = 2000
# Lower bound of p·(1 − p) for a perfectly separated class: keeps the diagonal away from 0 where decay is tiny.
_MIN_SPREAD = 1e-6
# Logits made at once: 512 KiB stay in a CPU's cache, which takes a third off the time of a sweep; a GPU needs more work.
_LOGITS = {"cpu": 2**16, "cuda": 2**24}
# Of the nearest neighbours.
TEMPERATURE = 0.07
# Images whose neighbours are looked for at once.
_IMAGES = {"cpu": 1024, "cuda": 4096}
# Entries of the votes of a block of images.
_SCORES = 2**22


@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier."""

    weights_CD: torch.Tensor  # float64 [C, D]
    # float64 [C]; −∞ for a class without a training image, which is never predicted. Where images have several classes,
    # +∞ for one that every training image has.
    bias_C: torch.Tensor

    def scores(self, features_ND: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the logits of block after block of images, float64 [B, C]."""
        for rows_BD in torch.split(features_ND, _rows_at_once(self.bias_C)):
            yield torch.addmm(self.bias_C, rows_BD.double(), self.weights_CD.T)


@dataclasses.dataclass(frozen=True)
class Solution:
    """The result of a fit: the classifier, F there, and the largest entry of F's gradient, in the given coordinates."""

    classifier: LinearClassifier
    objective: float
    gradient_norm: float
    iterations: int
    # Whether the gradient norm is within the tolerance, and the next step promises to decrease F by no more than is
    # allowed; False where the iterations ran out, or rounding left no descent.
    converged: bool


@dataclasses.dataclass(frozen=True)
class _Point:
    """F at some parameters, weights and intercepts last, in centred, rotated coordinates: [C, D + 1] all."""

    parameters: torch.Tensor
    objective: float
    gradient: torch.Tensor
    diagonal: torch.Tensor  # estimate of the diagonal of F's Hessian


def regularisation_grid() -> list[float]:
    """Return the values of C that are tried: 45 in 1e-6 … 1e5, evenly spaced in their logarithm.

    Source: DINOv2's protocol: docs/method.md#linear-probe.
    """
    return [10.0 ** (-6 + step / 4) for step in range(45)]


class ProbeProblem:
    """Logistic regression on one set of features, for any number of strengths; in float64.

    Args:
        labels: Classes, int64 [N], in [0, C); or whether an image has a class, bool [N, C].
        num_classes: C; classes without an image are never predicted.

    Raises:
        ValueError: when shapes disagree, a label names no class, or there is no image.
    """

    def __init__(self, features_ND: torch.Tensor, labels: torch.Tensor, num_classes: int) -> None:
        if features_ND.ndim != 2 or len(features_ND) != len(labels) or not len(labels):
            raise ValueError(f"features {list(features_ND.shape)} and labels {list(labels.shape)} do not fit")
        self._unfitted_bias_C = torch.full((num_classes,), -torch.inf, dtype=torch.float64, device=labels.device)
        self._several = labels.ndim == 2
        if self._several:
            if labels.shape[1] != num_classes:
                raise ValueError(f"labels have {labels.shape[1]} columns; there are {num_classes} classes")
            images_C = labels.sum(dim=0)
            self._unfitted_bias_C[images_C == len(labels)] = torch.inf
            self._present = ((images_C > 0) & (images_C < len(labels))).nonzero()[:, 0]
            self._targets = labels[:, self._present]
        else:
            if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
                raise ValueError(f"labels are in [{labels.min()}, {labels.max()}], classes in [0, {num_classes - 1}]")
            self._present, self._targets = torch.unique(labels, return_inverse=True)
        exact_ND = features_ND.double()
        self._mean_D = exact_ND.mean(dim=0)
        centred_ND = exact_ND - self._mean_D
        variance_D, axes_DD = torch.linalg.eigh(centred_ND.T @ centred_ND / len(exact_ND))
        # Eigenvalues are ascending, so the last axes are those along which N images can vary.
        first = max(0, len(variance_D) - len(exact_ND) + 1)
        self._variance_D, self._axes_DD = variance_D[first:].clamp(min=0), axes_DD[:, first:]
        self._rotated_ND = centred_ND @ self._axes_DD

    def fit(
        self,
        c: float,
        start: LinearClassifier | None = None,
        tolerance: float = TOLERANCE,
        promised_decrease: float = PROMISED_DECREASE,
    ) -> Solution:
        """Solve for one strength.

        Args:
            c: Inverse strength of regularisation, as scikit-learn's ``C``.
            start: Classifier to begin from, such as that of a neighbouring strength; zeros when None.
            tolerance: Largest allowed entry of the gradient of F.
            promised_decrease: Largest decrease, as a share of F, that the next step may still promise at the end.
        """
        if len(self._present) < (1 if self._several else 2):
            # Every class belongs to all images or to none: there is nothing to fit.
            return Solution(self._classifier(self._rotate(None)), 0.0, 0.0, 0, converged=True)
        # Of two classes, the penalty of the one weight vector that scikit-learn fits.
        decay = (2.0 if len(self._present) == 2 and not self._several else 1.0) / (c * len(self._rotated_ND))
        point = self._evaluate(self._rotate(start), decay)
        iterations = 0
        last_objective = float("inf")
        while True:
            norm = self._gradient_norm(point.gradient)
            promised = float((point.gradient.square() / point.diagonal).sum()) / 2
            excess = max(norm / tolerance, (promised / (promised_decrease * point.objective)) ** 0.5)
            if excess <= 1 or iterations >= _MAX_ITERATIONS or point.objective >= last_objective:
                return Solution(self._classifier(point.parameters), point.objective, norm, iterations, excess <= 1)
            last_objective = point.objective
            point, more = self._descend(point, decay, excess, _MAX_ITERATIONS - iterations)
            iterations += more

    def _descend(self, start: _Point, decay: float, excess: float, max_iterations: int) -> tuple[_Point, int]:
        """Run L-BFGS until the gradient in scaled coordinates is that many times smaller; return also the iterations."""
        scale = start.diagonal.rsqrt()
        moved = torch.nn.Parameter(torch.zeros_like(scale))
        point = start

        def closure() -> float:
            nonlocal point
            parameters = start.parameters + scale * moved.detach()
            # It begins and mostly ends at the last point evaluated.
            if not torch.equal(parameters, point.parameters):
                point = self._evaluate(parameters, decay)
            moved.grad = scale * point.gradient
            return point.objective

        optimiser = torch.optim.LBFGS(
            [moved],
            max_iter=max_iterations,
            history_size=_HISTORY,
            tolerance_grad=float((scale * start.gradient).abs().max()) / excess,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        optimiser.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        closure()
        return point, optimiser.state[moved]["n_iter"]

    def _evaluate(self, parameters: torch.Tensor, decay: float) -> _Point:
        weights_CD, bias_C = parameters[:, :-1], parameters[:, -1]
        num_images = len(self._rotated_ND)
        at_once = _rows_at_once(bias_C)
        gradient = torch.zeros_like(parameters)
        loss = torch.zeros_like(bias_C[0])
        spread_C = torch.zeros_like(bias_C)
        own: tuple[torch.Tensor, ...]  # where an image has a class
        for rows_BD, targets in zip(
            torch.split(self._rotated_ND, at_once), torch.split(self._targets, at_once), strict=True
        ):
            logits_BC = torch.addmm(bias_C, rows_BD, weights_CD.T)
            if self._several:
                loss += functional.binary_cross_entropy_with_logits(logits_BC, targets.double(), reduction="sum")
                p_BC = logits_BC.sigmoid()
                own = (targets,)
            else:
                loss += functional.cross_entropy(logits_BC, targets, reduction="sum")
                p_BC = logits_BC.softmax(dim=1)
                own = (torch.arange(len(targets), device=targets.device), targets)
            spread_C += p_BC.sum(dim=0) - torch.linalg.vector_norm(p_BC, dim=0).square()
            p_BC[own] -= 1  # in place of the probabilities, the gradient of the loss by the logits
            gradient[:, :-1].addmm_(p_BC.T, rows_BD)
            gradient[:, -1] += p_BC.sum(dim=0)
        gradient /= num_images
        gradient[:, :-1] += decay * weights_CD
        spread_C = (spread_C / num_images).clamp(min=_MIN_SPREAD)
        return _Point(
            parameters,
            objective=float(loss) / num_images + decay / 2 * float(weights_CD.square().sum()),
            gradient=gradient,
            diagonal=torch.cat([torch.outer(spread_C, self._variance_D) + decay, spread_C[:, None]], dim=1),
        )

    def _gradient_norm(self, gradient: torch.Tensor) -> float:
        """Return the largest entry of the gradient in the coordinates of the given features."""
        weights_CD = gradient[:, :-1] @ self._axes_DD.T + torch.outer(gradient[:, -1], self._mean_D)
        return max(float(weights_CD.abs().max()), float(gradient[:, -1].abs().max()))

    def _rotate(self, start: LinearClassifier | None) -> torch.Tensor:
        """Return the parameters of a classifier in centred, rotated coordinates, intercepts last: float64 [C, D + 1]."""
        if start is None:
            return self._mean_D.new_zeros(len(self._present), len(self._variance_D) + 1)
        weights_CD = start.weights_CD[self._present]
        # A class that the start was not fitted on begins with intercept 0.
        bias_C = (start.bias_C[self._present] + weights_CD @ self._mean_D).nan_to_num(0.0, 0.0, 0.0)
        return torch.cat([weights_CD @ self._axes_DD, bias_C[:, None]], dim=1)

    def _classifier(self, parameters: torch.Tensor) -> LinearClassifier:
        weights_CD = self._mean_D.new_zeros(len(self._unfitted_bias_C), len(self._mean_D))
        bias_C = self._unfitted_bias_C.clone()
        weights_CD[self._present] = parameters[:, :-1] @ self._axes_DD.T
        bias_C[self._present] = parameters[:, -1] - weights_CD[self._present] @ self._mean_D
        return LinearClassifier(weights_CD, bias_C)


def sweep_regularisation(problem: ProbeProblem, grid: Sequence[float], looser: float = 1.0) -> Iterator[Solution]:
    """Fit every strength of an ascending grid, from the strongest regularisation on, starting each from those before.

    Solutions change smoothly with log C, so on an even grid the parabola through the last three leads close to the next: in
    a trial (4,000 images, 256 wide, 50 classes, 45 values) that took 221 iterations, and 593 from the last alone.

    Args:
        looser: How many times the tolerances of a fit are allowed.
    """
    last: deque[LinearClassifier] = deque(maxlen=3)
    for c in grid:
        start = last[-1] if last else None
        if len(last) == 3:
            first, second, third = last
            start = LinearClassifier(
                3 * (third.weights_CD - second.weights_CD) + first.weights_CD,
                3 * (third.bias_C - second.bias_C) + first.bias_C,
            )
        solution = problem.fit(c, start, looser * TOLERANCE, looser * PROMISED_DECREASE)
        last.append(solution.classifier)
        yield solution


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One strength of regularisation C, and the score of its classifiers on the images that they were not fitted on."""

    c: float
    score: float  # in [0, 1]
    solutions: tuple[Solution, ...]  # of each fold


def choose_point(points: Sequence[SweepPoint]) -> SweepPoint:
    """Return the point of the highest score; among equal scores the strongest regularisation."""
    return max(points, key=lambda point: (point.score, -point.c))


def _rows_at_once(bias_C: torch.Tensor) -> int:
    return max(1, _LOGITS[bias_C.device.type] // len(bias_C))


def stratum(labels: torch.Tensor) -> torch.Tensor:
    """Return the class by which each image is stratified: its own or, of several, the rarest; −1 for one without."""
    if labels.ndim == 1:
        return labels
    images_C = labels.sum(dim=0)
    own_NC = torch.where(labels, images_C, len(labels) + 1)
    return torch.where(labels.any(dim=1), own_NC.argmin(dim=1), -1)


def split_by_class(labels: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """Choose validation images, bool [N], the same share of every class (see `stratum`); a function of the arguments only.

    It is rounded; every class with at least two images keeps one on either side.
    """
    generator = torch.Generator().manual_seed(seed)
    labels_N = stratum(labels.cpu())
    chosen_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in sorted(set(labels_N.tolist())):
        members = (labels_N == label).nonzero()[:, 0]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen_N[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen_N


def folds_by_class(labels: torch.Tensor, num_folds: int, seed: int) -> torch.Tensor:
    """Deal images to folds, int64 [N], those of every class (see `stratum`) evenly; a function of the arguments only.

    The only image of a class is in none: −1.
    """
    generator = torch.Generator().manual_seed(seed)
    labels_N = stratum(labels.cpu())
    fold_N = torch.full_like(labels_N, -1)
    dealt = 0
    for label in sorted(set(labels_N.tolist())):
        members = (labels_N == label).nonzero()[:, 0]
        if len(members) > 1:
            # Each class goes on where the one before ended, so that folds are of one size also where classes are small.
            order = torch.randperm(len(members), generator=generator)
            fold_N[members[order]] = (dealt + torch.arange(len(members))) % num_folds
            dealt += len(members)
    return fold_N


def draw_shots(labels: torch.Tensor, shots: int, seed: int) -> torch.Tensor:
    """Draw so many images of every class, all of one with fewer; where images have several classes, the union of such draws.

    Draws of one seed are nested: those of fewer shots are part of those of more.

    Returns:
        Indices of the images drawn, ascending, int64; a function of the arguments only.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    classes = sorted(set(labels.tolist())) if labels.ndim == 1 else range(labels.shape[1])
    drawn_N = torch.zeros(len(labels), dtype=torch.bool)
    for label in classes:
        members = (labels == label if labels.ndim == 1 else labels[:, label]).nonzero()[:, 0]
        drawn_N[members[torch.randperm(len(members), generator=generator)[:shots]]] = True
    return drawn_N.nonzero()[:, 0]


def nearest_neighbours(
    images_ND: torch.Tensor, training_MD: torch.Tensor, k: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Find the training images most similar to each image, unit rows in float32.

    Of equal ones the smaller row number comes first [O].

    Yields:
        For block after block of images the cosines, float64 [B, k], descending, and the row numbers, int64 [B, k], both on
        the CPU.
    """
    for images_BD in torch.split(images_ND, _IMAGES[images_ND.device.type]):
        number_Bk, cosine_Bk = top(images_BD, training_MD, k)
        yield cosine_Bk.double().cpu(), number_Bk.cpu()


def vote(
    cosine_Nk: torch.Tensor, number_Nk: torch.Tensor, labels: torch.Tensor, num_classes: int
) -> Iterator[torch.Tensor]:
    """Score classes by the votes of an image's neighbours, each of weight exp(cosine / 0.07).

    Source: the protocol of DINO (Caron et al. 2021, §4.1; Wu et al. 2018, §3.4).

    Args:
        labels: Classes of the training images, int64 [M], or whether one has a class, bool [M, C].

    Yields:
        For block after block of images the share of the weight of all neighbours that is of the class, float64 [B, C] in
        (0, 1]; −∞ where no neighbour is. With one class an image, they are scikit-learn's ``predict_proba``.
    """
    at_once = max(1, _SCORES // num_classes)
    for cosine_Bk, number_Bk in zip(torch.split(cosine_Nk, at_once), torch.split(number_Nk, at_once), strict=True):
        weight_Bk = (cosine_Bk / TEMPERATURE).exp()
        votes_BC = weight_Bk.new_zeros(len(weight_Bk), num_classes)
        # One neighbour after another, so that the order of the sum is fixed.
        for weight_B, number_B in zip(weight_Bk.unbind(dim=1), number_Bk.unbind(dim=1), strict=True):
            own = labels[number_B]
            if own.ndim == 2:
                votes_BC += weight_B[:, None] * own
            else:
                votes_BC.scatter_add_(1, own[:, None], weight_B[:, None])
        yield torch.where(votes_BC > 0, votes_BC / weight_Bk.sum(dim=1, keepdim=True), -torch.inf)
