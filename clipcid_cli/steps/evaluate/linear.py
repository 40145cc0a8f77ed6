"""`eval-linear`: frozen features of all splits → logistic regression, C chosen on held-out images → metrics."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from clipcid_cli.algorithms.metrics.chance import guess_classes, guess_order, largest_class
from clipcid_cli.algorithms.metrics.classification import (
    ACCURACY_TOP_K,
    MULTI_LABEL_METRICS,
    SINGLE_LABEL_METRICS,
    measure_scores,
    score_metrics,
)
from clipcid_cli.algorithms.metrics.intervals import CellMetrics
from clipcid_cli.algorithms.probe import (
    PROMISED_DECREASE,
    TOLERANCE,
    LinearClassifier,
    ProbeProblem,
    Solution,
    SweepPoint,
    choose_point,
    draw_shots,
    nearest_neighbours,
    regularisation_grid,
    split_by_class,
    sweep_regularisation,
    vote,
)
from clipcid_cli.errors import ClipcidError, UsageError
from clipcid_cli.formats.data.benchmark import (
    BenchmarkFolder,
    customary_metric,
    find_benchmark_folder,
    name_data,
    read_class_names,
)
from clipcid_cli.formats.data.dataset import Dataset
from clipcid_cli.formats.data.samples import Sample, read_vector_length
from clipcid_cli.formats.embeddings.rows import Kind
from clipcid_cli.formats.fingerprint import FileRecord, record
from clipcid_cli.formats.output import Output
from clipcid_cli.formats.results.evaluations import LinearSidecar
from clipcid_cli.formats.results.features import ImageFeatures, features_path, read_features, write_features
from clipcid_cli.formats.results.metrics import (
    CLASSIFICATION,
    MULTI_LABEL,
    metrics_stem,
    read_metrics,
    skipped_path,
    write_metrics,
)
from clipcid_cli.formats.skipped import make_table, write_skipped
from clipcid_cli.formats.work_directory import WorkDirectory
from clipcid_cli.runtime.distributed import open_dist_context
from clipcid_cli.runtime.models.names import ModelName
from clipcid_cli.runtime.pipeline import threads_for
from clipcid_cli.runtime.randomness import derive_seed
from clipcid_cli.runtime.timing import timed
from clipcid_cli.steps import reporting
from clipcid_cli.steps.data_index import open_named
from clipcid_cli.steps.evaluate.model import EvaluatedModel, warn_of_skips
from clipcid_cli.steps.evaluate.result import Draws, FewShot, LinearResult, Preview, Sweep
from clipcid_cli.steps.evaluate.tasks import ZeroshotTask, find_copy
from clipcid_cli.steps.models import choose_model
from clipcid_cli.steps.preflight import validate_samples
from clipcid_cli.steps.settings.eval_linear import METRICS, EvalLinearSettings

_TASK = "linear_probe"
# Draws of the test images for an interval, as many as `eval-zeroshot` makes by default.
_DRAWS = 1000
# The probe itself does not depend on them.
_MAY_DIFFER = frozenset({"shots", "shot_repeats", "knn"})


def run(settings: EvalLinearSettings) -> LinearResult | Preview:
    """Fit and measure a linear probe."""
    with open_dist_context(settings.device) as context:
        plan = context.on_rank0(lambda: make_plan(settings))
        for task in plan.splits.values():
            validate_samples(task.dataset, context, settings, dry_run=settings.dry_run)
        if settings.dry_run:
            reporting.note(f"Would fit {plan.name.spec} on {plan.splits['train'].dataset.spec} and write {plan.path}.")
            return Preview(plan.dataset, plan.name.spec, _TASK, {"metrics": str(plan.path)})
        return _evaluate(plan, EvaluatedModel(plan.name, context, settings))


@dataclasses.dataclass(frozen=True)
class ProbePlan:
    """A linear probe."""

    name: ModelName
    dataset: str
    classes: tuple[str, ...]  # in the order of the training split's labels
    metric: str  # by which the regularisation strength is chosen
    # ``train`` and ``test``; without ``val`` the strength is chosen on a part of the training split.
    splits: dict[str, ZeroshotTask]
    path: Path  # the metrics file
    settings: EvalLinearSettings


def make_plan(settings: EvalLinearSettings) -> ProbePlan:
    """Find the model, open all splits and match their classes: class folders by name, numbered classes by number."""
    model = choose_model(settings.model, settings.work, positional_of="eval-linear")
    known = find_copy(settings.data, settings.data_root) if settings.data is not None else None
    folder = os.path.expanduser(str(settings.data)).rstrip("/") if known is None else str(known[1])
    given = {"train": settings.train or f"{folder}/train", "test": settings.test or f"{folder}/test"}
    for split, data in given.items():
        is_named = getattr(settings, split) is not None or "://" in data or "{" in data
        if not (is_named or os.path.exists(data) or glob.glob(data)):
            raise ClipcidError(
                f"There is no data at {data}.",
                f"Give --{split}, or a DATA folder that holds train/ and test/; the first positional argument is the model.",
            )
    # Both splits have the name of their data set.
    name = name_data(given["test"]).partition("/")[0] if known is None else known[0].name
    if settings.val is not None:
        given["val"] = settings.val
    opened = {split: open_named(settings, data) for split, data in given.items()}
    train = opened["train"]
    described = find_benchmark_folder(given["train"], "train")
    several = described.dataset_type == MULTI_LABEL
    if not several:
        first = next(sample for shard in train.shards for sample in shard.stream())
        several = first.label is None and (first.labels is not None or first.multi_hot is not None)
    classes = _class_names(described, opened)
    kind = MULTI_LABEL if several else CLASSIFICATION
    splits = {
        split: ZeroshotTask(f"{name} {split}", kind, dataset, classes, label_of=_labels_of(train, dataset))
        for split, dataset in opened.items()
    }
    metric = choose_metric(settings.metric, name, several=several)
    path = WorkDirectory(settings.work).eval / f"{metrics_stem(name, model.slug, _TASK)}.json"
    return ProbePlan(model, name, classes, metric, splits, path, settings)


def _labels_of(train: Dataset, other: Dataset) -> tuple[int, ...] | None:
    """Return the training split's label of each class of another split; None where both number them alike."""
    if other.classes is None or train.classes in (None, other.classes):
        return None
    unknown = sorted(set(other.classes) - set(train.classes))
    if unknown:
        raise ClipcidError(
            f"{other.spec} has {len(unknown)} classes that {train.spec} lacks: {', '.join(unknown[:5])}"
            f"{', …' if len(unknown) > 5 else ''}.",
            "Give the class folders of both splits the same names.",
        )
    return tuple(train.classes.index(name) for name in other.classes)


def choose_metric(requested: str, name: str, *, several: bool) -> str:
    """Return the metric by which C is chosen: the requested one, or the customary one of such a data set."""
    possible = MULTI_LABEL_METRICS if several else SINGLE_LABEL_METRICS
    if requested == "auto":
        return customary_metric(name, possible)
    if requested not in possible:
        raise UsageError(
            f"--metric {requested} does not fit {name}, where an image has {'several classes' if several else 'one class'}.",
            f"Choose {' or '.join(metric for metric in possible if metric in METRICS)}.",
        )
    return requested


def _class_names(described: BenchmarkFolder, splits: dict[str, Dataset]) -> tuple[str, ...]:
    """Return the class names: the training split's folders, the lines of a file, or else numbers up to the largest used."""
    train = splits["train"]
    if train.classes is not None:
        return train.classes
    if described.class_names is not None:
        return read_class_names(described.class_names)
    samples = (sample for dataset in splits.values() for shard in dataset.shards for sample in shard.stream())
    count = max(map(_min_classes, samples), default=0)
    if not count:
        raise ClipcidError(
            f"{train.spec}: no sample has a class.",
            "A linear probe needs a .cls next to each image (or a .npy with a 1 for each of its classes), a `label` column "
            "or one folder per class.",
        )
    return tuple(map(str, range(count)))


def _min_classes(sample: Sample) -> int:
    """Return the smallest number of classes that one sample allows."""
    if sample.multi_hot is not None:
        return read_vector_length(sample)
    numbers = (sample.label,) if sample.label is not None else sample.labels or ()
    return max(numbers, default=-1) + 1


def _evaluate(plan: ProbePlan, model: EvaluatedModel) -> LinearResult:
    path = plan.path
    context = model.context
    data = context.on_rank0(lambda: {split: task.fingerprints() for split, task in plan.splits.items()})
    inputs = [file for records in data.values() for file in records]
    with model.claim(path, LinearSidecar, _identity(plan), inputs, _MAY_DIFFER) as output:
        # An earlier probe that also has a few-shot curve, or nearest neighbours, answers the question without them.
        more = plan.settings.shot_counts or plan.settings.neighbour_counts
        usable = output.finished if more else output.finished or output.earlier

        def find_result() -> LinearResult | None:
            if usable is None or not path.is_file():
                return None
            reporting.note(f"{path} already holds {model.name.spec} on {plan.dataset}.")
            return _make_result(usable, path, reused=True)

        result = context.on_rank0(find_result)
        if result is not None:
            return result
        seconds: dict[str, float] = {}
        with timed(seconds, "encode"):
            features = {split: extract_features(model, task, data[split]) for split, task in plan.splits.items()}
        return context.on_rank0(lambda: _write(plan, model, features, seconds, output))


def extract_features(model: EvaluatedModel, task: ZeroshotTask, data: list[FileRecord]) -> ImageFeatures:
    """Return a model's features of the split with the fingerprints `data`, which are kept for later runs."""
    info = model.model.info
    context = model.context
    identity = {
        "weights": info.weights_hash,
        "config": info.config,
        "preprocess": info.preprocess_hash,
        "data": [[file.size, file.hash] for file in data],
        "keys": task.dataset.keys,
        "columns": dataclasses.asdict(task.dataset.columns),
        "labels": task.label_of,
        "classes": len(task.class_names),
        "precision": model.precision.name,
        "batch_size": model.batch_size,
        "skipped": "listed",  # which earlier files lack
    }
    path = features_path(WorkDirectory(model.settings.work).features, info.slug, identity)
    kept = context.on_rank0(lambda: read_features(path))
    if kept is None and path.exists():
        reporting.warn(f"{path} is damaged: the features of {task.name} are computed again.")
    if kept is not None:
        reporting.note(f"{task.name}: features of {len(kept):,} images from {path}.")
        context.on_rank0(lambda: model.validate_usable(task, len(kept) + kept.skips.total, len(kept), kept.skips))
        return kept
    rows = model.encode(task)
    features = context.on_all(lambda: ImageFeatures(rows.encoded.rows[Kind.IMAGES], rows.labels, rows.skips))
    context.on_rank0(lambda: write_features(path, features))
    return features


def _identity(plan: ProbePlan) -> dict[str, Any]:
    """Return the settings by which a finished probe is recognised."""
    settings = plan.settings
    return {
        "dataset": plan.dataset,
        "classes": list(plan.classes),
        "val_fraction": None if "val" in plan.splits else settings.val_fraction,
        "seed": settings.seed,
        "metric": plan.metric,
        "shots": list(settings.shot_counts),
        "shot_repeats": settings.shot_repeats if settings.shot_counts else None,
        "knn": list(settings.neighbour_counts),
        "grid": regularisation_grid(),
        "tolerance": TOLERANCE,
        "promised_decrease": PROMISED_DECREASE,
        "keys": settings.keys,
        "columns": dataclasses.asdict(plan.splits["train"].dataset.columns),
    }


def _write(
    plan: ProbePlan,
    model: EvaluatedModel,
    features: dict[str, ImageFeatures],
    seconds: dict[str, float],
    output: Output[LinearSidecar],
) -> LinearResult:
    """Fit the probe on the features of all splits, measure it, and write its files."""
    for split, own in features.items():
        warn_of_skips(plan.splits[split].name, own.skips)
    images = {split: own.to(model.context.device) for split, own in features.items()}
    test = images["test"]
    with timed(seconds, "sweep"):
        fits = ProbeFits(images, plan)
        points, best = fits.sweep()
    with timed(seconds, "refit"):
        solution = fits.refit(best)
        of_images = fits.measure(solution.classifier, test)
        measured = of_images.values()
        intervals = of_images.intervals(_DRAWS, plan.settings.seed)
    if "acc5" in measured and len(plan.classes) < ACCURACY_TOP_K:
        reporting.note(f"lp_acc5 is null because there are only {len(plan.classes)} classes.")
    with timed(seconds, "shots"):
        shots = fits.few_shots(test)
    with timed(seconds, "neighbors"):
        neighbours = fits.measure_neighbours(test)
    probe = {f"lp_{name}": value for name, value in measured.items()}
    guessed, majority = _guess(test.labels, len(plan.classes))
    output.start()
    written = output.root / plan.path.name
    write_metrics(written, model.make_metrics(plan.dataset, _TASK, probe | neighbours))
    outputs = [written]
    skipped = output.work / skipped_path(plan.path).name
    if write_skipped(skipped, [make_table(own.skips.listed) for own in features.values()]):
        outputs.append(skipped)
    counts = {
        "images": len(test),
        "train_images": len(fits.images),
        "validation_images": len(fits.held_out),
        "skipped": {split: own.skips.counts for split, own in features.items()},
    }
    result = {
        "intervals": {f"lp_{name}": bounds for name, bounds in intervals.items()},
        "metric": plan.metric,
        "c": best.c,
        "validation_score": best.score,
        "sweep": Sweep([point.c for point in points], [point.score for point in points]),
        "shots": shots,
        "chance": {name: guessed[short] for name in probe | neighbours if (short := name.partition("_")[2]) in guessed},
        "majority": majority,
        "classes": len(plan.classes),
        **counts,
    }
    sidecar = output.commit(
        counts=counts,
        seconds=seconds,
        outputs=[record(file, output.work) for file in outputs],
        result=result,
        solution=_describe(solution),
        sweep=[{"c": point.c, "validation_score": point.score, **_describe(point.solution)} for point in points],
    )
    return _make_result(sidecar, plan.path, reused=False)


def _guess(labels: torch.Tensor, num_classes: int) -> tuple[dict[str, float], float | None]:
    """Return what a guess scores on images of such classes, by metric, and the share of the largest class."""
    if labels.ndim == 2:
        return guess_order(labels.cpu().numpy()), None
    return guess_classes(num_classes), largest_class(labels.cpu().numpy())


def _make_result(sidecar: LinearSidecar, path: Path, *, reused: bool) -> LinearResult:
    content = msgspec.structs.asdict(read_metrics(path)) | sidecar.result
    files = {"metrics": str(path)} | ({"skipped": str(skipped_path(path))} if skipped_path(path).is_file() else {})
    content |= {"seconds": sidecar.seconds, "files": files, "reused": reused}
    return msgspec.convert(content, LinearResult)


def _describe(solution: Solution) -> dict[str, Any]:
    """Say how well a fit ended, for the sidecar."""
    return {name: getattr(solution, name) for name in ("objective", "gradient_norm", "iterations", "converged")}


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
            self.fitted = train
            self.held_out = val
        else:
            seed = derive_seed("probe", self.settings.seed)
            chosen = split_by_class(train.labels, self.settings.val_fraction, seed)
            self.images = train
            self.fitted = train[~chosen]
            self.held_out = train[chosen]
        self._validate()

    def _validate(self) -> None:
        """Refuse images that leave nothing to choose or to learn, and more shots or neighbours than there are."""
        if not len(self.held_out):
            raise ClipcidError(
                "The training split has one image per class, so none can be held out to choose C.",
                "Give more images per class with --train, or validation images with --val.",
            )
        labels = self.fitted.labels
        several = labels.ndim == 2
        if several and not bool(self.held_out.labels.any()):
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
        """Fit every strength on the images to fit on, and measure it on the held-out ones; return all, and the best."""
        reporting.note(
            f"Fitting {len(self.grid)} values of C on {len(self.fitted):,} images, choosing on {len(self.held_out):,}."
        )
        with reporting.progress("Linear probe", len(self.grid), "values of C") as progress:
            points = self._sweep(self.fitted, progress.advance)
        short = [point for point in points if not point.solution.converged]
        if short:
            reporting.warn(
                f"{len(short)} of {len(points)} fits did not converge, the first at C = {short[0].c:.3g} with "
                f"a gradient norm of {short[0].solution.gradient_norm:.2e}."
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

    def _sweep(self, images: ImageFeatures, advance: Callable[[], None]) -> list[SweepPoint]:
        points = []
        with threads_for(images.rows.numel() * self.num_classes):
            problem = ProbeProblem(images.rows, images.labels, self.num_classes)
            for c, solution in zip(self.grid, sweep_regularisation(problem, self.grid), strict=True):
                scores = self.measure(solution.classifier, self.held_out).values()
                points.append(SweepPoint(c, scores[self.metric], solution))
                advance()
        return points

    def refit(self, chosen: SweepPoint) -> Solution:
        """Fit with the chosen strength on all training and validation images."""
        with threads_for(self.images.rows.numel() * self.num_classes):
            problem = ProbeProblem(self.images.rows, self.images.labels, self.num_classes)
            solution = problem.fit(chosen.c, chosen.solution.classifier)
        if not solution.converged:
            reporting.warn(
                f"The fit did not converge: the gradient norm is {solution.gradient_norm:.2e} after {solution.iterations} "
                f"iterations (tolerance {TOLERANCE:g})."
            )
        return solution

    def measure(self, classifier: LinearClassifier, images: ImageFeatures) -> CellMetrics:
        return score_metrics(classifier.scores(images.rows), images.labels, self.num_classes)

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
                    drawn = self.fitted[draw_shots(self.fitted.labels, shots, seed)]
                    best = choose_point(self._sweep(drawn, lambda: None))
                    draws.append(len(drawn))
                    chosen.append(best.c)
                    metrics.append(self.measure(best.solution.classifier, test).values())
                    progress.advance()
                at_edge = sum(map(self._is_end, chosen))
                if at_edge:
                    self._warn_of_end(f"--shots {shots}: the best C of {at_edge} of {repeats} draws is")
                values = {f"lp_{name}": Draws.of([one[name] for one in metrics]) for name in metrics[0]}
                curve.append(FewShot(shots, max(draws), chosen, at_edge, values))
        return curve
