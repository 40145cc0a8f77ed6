"""What `eval-linear` answers: the JSON object, in the order of its keys."""

from __future__ import annotations

import msgspec

from clipcid_cli.formats.results.metrics import Metrics
from clipcid_cli.records import Draws


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
    groups: int | None = None  # of test images that the intervals draw together; None where they draw each by itself
    metric: str  # by which the strength `c` was chosen
    c: float
    # In which the images were held out in turn to choose it; 1 where one part of them was, or those of ``--val``.
    folds: int
    validation_score: float
    sweep: Sweep
    shots: list[FewShot]
    chance: dict[str, float] = msgspec.field(default_factory=dict)  # as of `ZeroshotResult`, of the test split
    majority: float | None = None
    images: int  # of the test split
    train_images: int  # all that the final fit uses
    validation_images: int
    repeated_images: int = 0  # of the test split, that are among those of training too
    classes: int
    skipped: dict[str, dict[str, int]]  # by split
    seconds: dict[str, float]
    files: dict[str, str]
    reused: bool
