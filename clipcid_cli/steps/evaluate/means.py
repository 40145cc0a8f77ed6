"""What models score on the mean of several data sets, with intervals over the images of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from clipcid_cli.algorithms.metrics.intervals import interval_of_mean
from clipcid_cli.steps.evaluate.result import MeanScore, ZeroshotResult


def average_results(results: Sequence[ZeroshotResult]) -> list[MeanScore]:
    """Average the customary metrics of each model over the data sets of a task, where there are several with a value."""
    by_task: dict[tuple[str, str, str], list[ZeroshotResult]] = {}
    for result in results:
        by_task.setdefault((result.model, result.pretrained, result.task), []).append(result)
    means = list[MeanScore]()
    for (model, pretrained, task), own in by_task.items():
        values = [result.metrics[result.customary] for result in own]
        if len(own) > 1 and None not in values:
            bounds = [result.intervals[result.customary] for result in own if result.customary in result.intervals]
            counted = {result.dataset: result.customary for result in own}
            interval = interval_of_mean(values, bounds) if len(bounds) == len(values) else None
            means.append(MeanScore(model, pretrained, task, counted, fmean(values), interval))
    return means
