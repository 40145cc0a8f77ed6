"""What `eval-zeroshot` and `eval-linear` answer: the JSON objects, in the order of their keys."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev

import msgspec

from clipcid_cli.formats.results.metrics import LinesRecord, Metrics


class Preview(msgspec.Struct):
    """What a dry run would measure."""

    dataset: str
    model: str
    task: str
    files: dict[str, str]


class Previews(msgspec.Struct):
    """What a dry run would measure of several pairs of model and data set."""

    results: list[Preview]


class ZeroshotResult(Metrics, kw_only=True):
    """A model on a data set."""

    prompts: dict[str, LinesRecord] | None  # ``class_names`` and ``templates``; None for retrieval
    customary: str  # name of the metric usually reported for the data set
    intervals: dict[str, tuple[float, float]]  # the 95 % interval of each metric; none with ``--bootstrap 0``
    chance: dict[str, float]  # what a guess scores, of the metrics where that is known
    majority: float | None  # share of the images in the largest class, where each has one
    images: int
    skipped: dict[str, int]
    images_per_second: float
    seconds: dict[str, float]
    # ``metrics``, and ``predictions`` where they were asked for; of a single pair ``table`` and ``report`` too.
    files: dict[str, str]
    reused: bool

    @property
    def shown_model(self) -> str:
        """The model's name for people: of a folder the short one, since its path would take half a terminal."""
        return self.model if Path(self.pretrained).is_dir() else f"{self.model} {self.pretrained}"


class ZeroshotResults(msgspec.Struct):
    """Every model on every data set; `files` are ``table`` and ``report``."""

    results: list[ZeroshotResult]
    files: dict[str, str]


class ComparedLines(msgspec.Struct):
    """The class names, or the templates, of the two results that are compared."""

    first: LinesRecord
    second: LinesRecord
    same: bool


class Draws(msgspec.Struct):
    """A metric of several random draws, or seeds; the standard deviation is None for one, and all are without a value."""

    mean: float | None
    std: float | None
    values: list[float | None]

    @classmethod
    def of(cls, values: list[float]) -> Draws:
        if any(math.isnan(value) for value in values):
            return cls(None, None, [None if math.isnan(value) else value for value in values])
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, [*values])


class Difference(msgspec.Struct):
    """One metric of both sides, second minus first; `real` where it is more than the choice of images explains."""

    first: float | Draws  # of several seeds `Draws`
    # Likewise; then `difference` is that of the means, and `interval` and `real` count the choice of seeds too.
    second: float | Draws
    difference: float
    interval: tuple[float, float]
    p_value: float | None  # McNemar's, of a pair of results whose metric counts images that are right or wrong
    real: bool
    enough_seeds: bool  # whether there are seeds enough for a verdict; of two results on one seed each always
    verdict: str
    # Of the margin, where one was given and there are seeds enough: whether the second loses less than it to the first, and
    # whether neither loses so much to the other.
    no_worse: bool | None = None
    equivalent: bool | None = None


class ComparisonResult(msgspec.Struct):
    """Two results on the same images, or of several seeds the results of each side."""

    compared: list[str] | list[list[str]]  # two files, or a list of files for each side
    models: list[str] | list[list[str]]  # of these files
    dataset: str
    images: int
    prompts: dict[str, ComparedLines] | None  # None for retrieval, and where nothing records them
    differences: dict[str, Difference]
    files: dict[str, str]
    margin: float | None = None  # in points


class FewShot(msgspec.Struct):
    """Probes on a few images of each class, a value for each draw."""

    shots: int
    images: int  # most images that were drawn
    c: list[float]  # the strength chosen for each draw; an end of the range that was tried `at_edge` times
    at_edge: int
    metrics: dict[str, Draws]


class Sweep(msgspec.Struct):
    """Every strength that was tried, and its score on the validation images."""

    c: list[float]
    score: list[float]


class LinearResult(Metrics, kw_only=True):
    """A linear probe: its metrics are named ``lp_…``, and ``knn<K>_…`` those of a vote of the nearest neighbours."""

    # The 95 % interval of each metric after ``lp_``, over the test images; the probe itself is one.
    intervals: dict[str, tuple[float, float]] = msgspec.field(default_factory=dict)
    metric: str  # by which the strength `c` was chosen
    c: float
    validation_score: float
    sweep: Sweep
    shots: list[FewShot]
    chance: dict[str, float] = msgspec.field(default_factory=dict)  # as of `ZeroshotResult`, of the test split
    majority: float | None = None
    images: int  # of the test split
    train_images: int  # all that the final fit uses
    validation_images: int
    classes: int
    skipped: dict[str, dict[str, int]]  # by split
    seconds: dict[str, float]
    files: dict[str, str]
    reused: bool
