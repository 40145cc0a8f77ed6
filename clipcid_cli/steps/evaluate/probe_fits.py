"""The fits of a linear probe: a strength is chosen on images held out, few-shot probes, and the vote of neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from clipcid_cli.algorithms.metrics.chance import guess_classes, guess_order, largest_class
from clipcid_cli.algorithms.metrics.classification import measure_scores, score_metrics
from clipcid_cli.algorithms.metrics.intervals import CellMetrics
from clipcid_cli.algorithms.probe import (
    TOLERANCE,
    LinearClassifier,
    ProbeProblem,
    Solution,
    SweepPoint,
    choose_point,
    draw_shots,
    folds_by_class,
    nearest_neighbours,
    regularisation_grid,
    split_by_class,
    sweep_regularisation,
    vote,
)
from clipcid_cli.errors import ClipcidError
from clipcid_cli.formats.results.features import ImageFeatures
from clipcid_cli.records import Draws
from clipcid_cli.runtime.pipeline import threads_for
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.evaluate.predictions import class_columns, multi_label_columns
from clipcid_cli.steps.evaluate.probe_plan import ProbePlan
from clipcid_cli.steps.evaluate.probe_result import FewShot

# Of fewer images a fifth tells strengths apart too badly: five folds, and all of them do.
_MANY_IMAGES = 5000
_FOLDS = 5
_FRACTION = 0.2
# Fits of folds are compared by what they predict, and never used: so loose, five cost what a single exact one does, and
# their accuracies differ from those of exact fits by 0.001 (1,126 images, 192 wide, 52 classes).
_LOOSER = 100.0


@dataclasses.dataclass(frozen=True)
class Fold:
    """Images that a probe is fitted on, and others that its strength is chosen by."""

    fitted: ImageFeatures
    held_out: ImageFeatures


class ProbeFits:
    """All fits on one training split: a strength is chosen on images held out, the final fit uses all images."""

    def __init__(self, images: dict[str, ImageFeatures], plan: ProbePlan) -> None:
        """Divide the images of ``train``, where there are none of ``val``; what cannot be fitted or measured is an error."""
        self.num_classes = len(plan.classes)
        self.metric = plan.metric
        self.settings = plan.settings
        self.grid = regularisation_grid()
        train = images["train"]
        if "val" in images:
            val = images["val"]
            self.images = ImageFeatures(torch.cat([train.rows, val.rows]), torch.cat([train.labels, val.labels]))
            self.split = Fold(train, val)
        else:
            seed = derive_seed("probe", self.settings.seed)
            chosen = split_by_class(train.labels, self.settings.val_fraction or _FRACTION, seed)
            self.images = train
            self.split = Fold(train[~chosen], train[chosen])
        self._validate()
        self.folds = [self.split]
        if "val" not in images and self.settings.val_fraction is None and len(train) < _MANY_IMAGES:
            fold_of = folds_by_class(train.labels, _FOLDS, seed)
            # Of fewer images than folds some are empty.
            dealt = sorted(set(fold_of.tolist()) - {-1})
            self.folds = [Fold(train[fold_of != fold], train[fold_of == fold]) for fold in dealt]

    @property
    def num_held_out(self) -> int:
        return sum(len(fold.held_out) for fold in self.folds)

    def _validate(self) -> None:
        """Refuse images that leave nothing to choose or to learn, and more shots or neighbours than there are."""
        if not len(self.split.held_out):
            raise ClipcidError(
                "The training split has one image per class, so none can be held out to choose C.",
                "Give more images per class with --train, or validation images with --val.",
            )
        labels = self.split.fitted.labels
        several = labels.ndim == 2
        if several and not bool(self.split.held_out.labels.any()):
            raise ClipcidError(
                "No validation image has a class, so C cannot be chosen.",
                "Give images with classes with --val, or omit it.",
            )
        if several and bool((labels.all(dim=0) | ~labels.any(dim=0)).all()):
            raise ClipcidError(
                "Every class belongs to all training images or to none, so there is nothing to learn.",
                "Give images that differ in their classes.",
            )
        images_of = labels.sum(dim=0) if several else torch.bincount(labels, minlength=self.num_classes)
        present = images_of[images_of > 0]
        for shots in self.settings.shot_counts:
            few = int((present < shots).sum())
            if few == len(present):
                raise ClipcidError(
                    f"--shots {shots}: no class has {shots} training images besides those held out; the largest has "
                    f"{int(images_of.max())}.",
                    "Give smaller numbers, or hold out less with --val-fraction.",
                )
            if few:
                reporting.warn(
                    f"--shots {shots}: {few} of {len(present)} classes have fewer images, all of which are used."
                )
        max_neighbours = max(self.settings.neighbour_counts, default=0)
        if max_neighbours > len(self.images):
            raise ClipcidError(
                f"--knn {max_neighbours}: there are only {len(self.images):,} training images.",
                f"Give numbers of at most {len(self.images):,}.",
            )

    def sweep(self) -> tuple[list[SweepPoint], SweepPoint]:
        """Fit every strength on all folds, and measure it on the held-out images; return all, and the best."""
        where = f"{len(self.split.fitted):,} images, choosing on {len(self.split.held_out):,}"
        if len(self.folds) > 1:
            where = f"{len(self.images):,} images in {len(self.folds)} folds, choosing on each by the fit of the others"
        reporting.note(f"Fitting {len(self.grid)} values of C on {where}.")
        with reporting.progress("Linear probe", len(self.grid), "values of C") as progress:
            points = self._sweep(self.folds, progress.advance)
        fits = [(point.c, solution) for point in points for solution in point.solutions]
        short = [(c, solution) for c, solution in fits if not solution.converged]
        if short:
            c, first = short[0]
            reporting.warn(
                f"{len(short)} of {len(fits)} fits did not converge, the first at C = {c:.3g} with a gradient norm of "
                f"{first.gradient_norm:.2e}."
            )
        best = choose_point(points)
        if self._is_end(best.c):
            self._warn_of_end(f"The best C is {best.c:.3g},")
        return points, best

    def _is_end(self, c: float) -> bool:
        return c in (self.grid[0], self.grid[-1])

    def _warn_of_end(self, what: str) -> None:
        reporting.warn(
            f"{what} an end of the range {self.grid[0]:.3g} … {self.grid[-1]:.3g} that was tried; a better one may lie "
            "outside."
        )

    def _sweep(self, folds: Sequence[Fold], advance: Callable[[], None]) -> list[SweepPoint]:
        """Fit every strength on each fold; its score is of the held-out images of all folds together."""
        points = []
        labels = torch.cat([fold.held_out.labels for fold in folds])
        largest = max(fold.fitted.rows.numel() for fold in folds)
        with threads_for(largest * self.num_classes):
            problems = [ProbeProblem(fold.fitted.rows, fold.fitted.labels, self.num_classes) for fold in folds]
            looser = _LOOSER if len(folds) > 1 else 1.0
            sweeps = [sweep_regularisation(problem, self.grid, looser) for problem in problems]
            for c, *solutions in zip(self.grid, *sweeps, strict=True):
                scores = chain.from_iterable(
                    solution.classifier.scores(fold.held_out.rows)
                    for fold, solution in zip(folds, solutions, strict=True)
                )
                score = measure_scores(scores, labels, self.num_classes)[self.metric]
                points.append(SweepPoint(c, score, tuple(solutions)))
                advance()
        return points

    def refit(self, chosen: SweepPoint) -> Solution:
        """Fit with the chosen strength on all training and validation images."""
        with threads_for(self.images.rows.numel() * self.num_classes):
            problem = ProbeProblem(self.images.rows, self.images.labels, self.num_classes)
            solution = problem.fit(chosen.c, chosen.solutions[0].classifier)
        if not solution.converged:
            reporting.warn(
                f"The fit did not converge: the gradient norm is {solution.gradient_norm:.2e} after {solution.iterations} "
                f"iterations (tolerance {TOLERANCE:g})."
            )
        return solution

    def measure(self, classifier: LinearClassifier, images: ImageFeatures) -> CellMetrics:
        return score_metrics(classifier.scores(images.rows), images.labels, self.num_classes)

    def columns(self, classifier: LinearClassifier, images: ImageFeatures) -> dict[str, Any]:
        """Return the columns of the predictions for images, but for their keys."""
        labels = images.labels.cpu()
        blocks = (scores.cpu() for scores in classifier.scores(images.rows))
        if labels.ndim == 2:
            return multi_label_columns(labels, torch.cat(list(blocks)))
        return class_columns(labels, blocks)

    def measure_neighbours(self, test: ImageFeatures) -> dict[str, float]:
        """Return the metrics of the weighted vote of the nearest training images, each after ``knn<K>_``; none unasked."""
        counts = self.settings.neighbour_counts
        if not counts:
            return {}
        blocks = []
        with reporting.progress("Nearest neighbors", len(test), "images") as progress:
            for block in nearest_neighbours(test.rows, self.images.rows, counts[-1]):
                blocks.append(block)
                progress.advance(len(block[0]))
        cosines, neighbours = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        metrics = dict[str, float]()
        for k in counts:
            scores = vote(cosines[:, :k], neighbours[:, :k], self.images.labels.cpu(), self.num_classes)
            measured = measure_scores(scores, test.labels.cpu(), self.num_classes)
            metrics |= {f"knn{k}_{name}": value for name, value in measured.items()}
        return metrics

    def few_shots(self, test: ImageFeatures) -> list[FewShot]:
        """Fit on a few images of each class, repeatedly, and measure on the test images.

        Each draw is a separate probe: its images are not held out, its strength is chosen on those that are, no refit.
        """
        shot_counts = self.settings.shot_counts
        repeats = self.settings.shot_repeats
        if not shot_counts:
            return []
        curve = []
        with reporting.progress("Few-shot probes", len(shot_counts) * repeats, "draws") as progress:
            for shots in shot_counts:
                draws = []
                chosen = []
                metrics = []
                for repeat in range(repeats):
                    seed = derive_seed("shots", self.settings.seed, repeat)
                    fitted = self.split.fitted
                    drawn = fitted[draw_shots(fitted.labels, shots, seed)]
                    best = choose_point(self._sweep([Fold(drawn, self.split.held_out)], lambda: None))
                    draws.append(len(drawn))
                    chosen.append(best.c)
                    metrics.append(self.measure(best.solutions[0].classifier, test).values())
                    progress.advance()
                at_edge = sum(map(self._is_end, chosen))
                if at_edge:
                    self._warn_of_end(f"--shots {shots}: the best C of {at_edge} of {repeats} draws is")
                values = {f"lp_{name}": Draws.from_values([one[name] for one in metrics]) for name in metrics[0]}
                curve.append(FewShot(shots, max(draws), chosen, at_edge, values))
        return curve


def guess_labels(labels: torch.Tensor, num_classes: int) -> tuple[dict[str, float], float | None]:
    """Return what a guess scores on images of such classes, by metric, and the share of the largest class."""
    if labels.ndim == 2:
        return guess_order(labels.cpu().numpy()), None
    return guess_classes(num_classes), largest_class(labels.cpu().numpy())


def describe_fits(solutions: Sequence[Solution]) -> dict[str, Any]:
    """Say how well fits ended, for the sidecar: the worst of them."""
    return {
        "objective": max(solution.objective for solution in solutions),
        "gradient_norm": max(solution.gradient_norm for solution in solutions),
        "iterations": max(solution.iterations for solution in solutions),
        "converged": all(solution.converged for solution in solutions),
    }
