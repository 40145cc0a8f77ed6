"""What ``eval-zeroshot --suite`` answers: the JSON object, in the order of its keys."""

from __future__ import annotations

import msgspec

from clipcid_cli.steps.evaluate.result import ZeroshotResult


class SuiteScores(msgspec.Struct):
    """What a model scores on a suite, by the suite's own names."""

    model: str
    pretrained: str
    scores: dict[str, float | None]  # of each data set, by the metric that the suite counts; None where it has none
    groups: dict[str, float | None]  # means of some data sets; None where one of them is missing
    average: float | None  # the mean of all data sets; None where one is missing
    mean_of_measured: float  # the mean of those with a score, which is not the suite's where one is missing
    # 95 % intervals over the images, of `scores`, of `groups` and of the mean of those measured; none with --bootstrap 0.
    intervals: dict[str, tuple[float, float]]
    group_intervals: dict[str, tuple[float, float]]
    mean_interval: tuple[float, float] | None


class SuiteResult(msgspec.Struct):
    """Every model on the data sets of a suite of which there are copies."""

    suite: str
    root: str
    datasets: int  # of the suite
    measured: int
    missing: list[str]
    without_metric: list[str]  # measured, and with too few images or candidates for the metric that counts
    counted: dict[str, str]  # the metric that counts, by data set
    models: list[SuiteScores]
    results: list[ZeroshotResult]
    files: dict[str, str]
